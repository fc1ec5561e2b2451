# tinymim on a CPU, not as root:
#   docker build -t tinymim . && docker run --rm -v "$PWD:/data" tinymim demo --out /data/demo
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 tinymim
WORKDIR /home/tinymim/source
COPY --chown=tinymim pyproject.toml README.md LICENSE constraints.txt ./
COPY --chown=tinymim tinymim tinymim
COPY --chown=tinymim export export
COPY --chown=tinymim mmseg_configs mmseg_configs
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir ".[openvino,video]" \
    && rm -rf /home/tinymim/source
USER tinymim
WORKDIR /data
ENTRYPOINT ["tinymim"]
CMD ["--help"]
