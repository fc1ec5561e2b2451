"""The web page: what the builder writes and refuses; the page itself in headless Chromium against Python's masks."""

import io
import json
import os
import resource
import shutil
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export.conftest import CLASSES
from tests.export.web.browser import chromium, need, served
from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.files import sha256_file
from tinymim_export import Predictor, build_web
from tinymim_export.precision.variants import apply_variants
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import load_proto, proto_metadata, save_proto, write_metadata
from tinymim_export.runtime.pictures import palette_for
from tinymim_export.runtime.predictor import read_photo
from tinymim_export.web.build import ORT_FILES, PAGE_FILES, web_contract

HEADER = b"/*!\n * ONNX Runtime Web v9.8.7\n */\n"
ALL = {*PAGE_FILES, *ORT_FILES, "style.css", "model.onnx", "contract.json"}


@pytest.fixture
def fake_ort(tmp_path):
    """The three files, as an unpacked package has them; no browser could run them."""
    dist = tmp_path / "ort/package/dist"
    dist.mkdir(parents=True)
    for name in (*ORT_FILES, "ort.webgpu.min.mjs"):
        (dist / name).write_bytes(HEADER + name.encode())
    return tmp_path / "ort"


def changed(source, path, **values):
    """A copy of a file with other metadata."""
    proto = load_proto(source)
    write_metadata(proto, values)
    save_proto(proto, path)
    return path


def contract_of(path):
    return web_contract(open_engine(path, threads=1))


def test_folder_holds_page_model_contract_and_runtime(exported, fake_ort, tmp_path, capsys):
    made = build_web(exported.fixed.onnx, tmp_path / "page", ort_web=fake_ort)
    assert {path.name for path in (tmp_path / "page").iterdir()} == ALL == set(made.files)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert sha256_file(tmp_path / "page/model.onnx") == made.sha256 == exported.fixed.sha256
    contract = json.loads((tmp_path / "page/contract.json").read_text())
    assert contract["classes"] == CLASSES
    assert contract["sha256"] == made.sha256
    assert "onnxruntime-web 9.8.7" in contract["about"]
    assert json.loads(made.to_json())["kind"] == "tinymim.web"
    assert "| model.onnx |" in made.to_markdown()
    made.print()
    assert "fixed.onnx (logits, 64x96, 7 classes)" in capsys.readouterr().out
    assert made.next.startswith(f"python -m http.server -d {tmp_path / 'page'} 8000")
    setup = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-data"]["tinymim_export.web"] == ["page/*"]


def test_contract_says_what_the_file_says(exported, tmp_path):
    fixed, mask = contract_of(exported.fixed.onnx), contract_of(exported.mask.onnx)
    assert (fixed["size"], fixed["mode"], fixed["crop"], fixed["stride"]) == ([64, 96], "slide", [64, 96], [42, 64])
    assert (fixed["scale"], fixed["keep_ratio"], fixed["range"]) == ([2048, 512], True, "normalised")
    assert (mask["size"], mask["output"], mask["mode"]) == ([None, None], "mask", "whole")
    assert "go through it whole" in mask["notes"][0]
    bare = contract_of(changed(exported.fixed.onnx, tmp_path / "bare.onnx", classes=None, palette=None))
    assert bare["classes"] == [f"class {i}" for i in range(7)]
    assert bare["palette"] == [list(colour) for colour in palette_for(7)]
    assert len(fixed["palette"]) == 7


def test_an_earlier_page_is_replaced_and_nothing_else_is(exported, fake_ort, tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    build_web(exported.fixed.onnx, page, ort_web=fake_ort)
    build_web(exported.mask.onnx, page, ort_web=fake_ort)
    assert json.loads((page / "contract.json").read_text())["name"] == "mask.onnx"
    assert {path.name for path in page.iterdir()} == ALL
    (page / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds other things"):
        build_web(exported.fixed.onnx, page, ort_web=fake_ort)
    assert (page / "holiday.jpg").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match="is a file"):
        build_web(exported.fixed.onnx, page / "holiday.jpg", ort_web=fake_ort)


def test_a_full_disk_leaves_the_earlier_page(exported, fake_ort, tmp_path):
    page = tmp_path / "page"
    build_web(exported.fixed.onnx, page, ort_web=fake_ort)
    before = {path.name: path.read_bytes() for path in page.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TinyMIMError, match="cannot write"):
            build_web(exported.mask.onnx, page, ort_web=fake_ort)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in page.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ort", "page"]


@pytest.mark.parametrize("place", ["", "package", "package/dist"])
def test_runtime_from_a_folder(exported, fake_ort, tmp_path, place):
    assert build_web(exported.fixed.onnx, tmp_path / "page", ort_web=fake_ort / place).ort_web == "9.8.7"


def test_runtime_from_an_archive_of_which_only_three_files_are_read(exported, fake_ort, tmp_path):
    path = tmp_path / "onnxruntime-web-9.8.7.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../escaped", "/escaped"):
            item = tarfile.TarInfo(name)
            item.size = 4
            archive.addfile(item, io.BytesIO(b"evil"))
        link = tarfile.TarInfo(f"package/dist/{ORT_FILES[1]}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.add(fake_ort / "package", "package")
    assert build_web(exported.fixed.onnx, tmp_path / "page", ort_web=path).ort_web == "9.8.7"
    assert (tmp_path / "page" / ORT_FILES[1]).read_bytes() == HEADER + ORT_FILES[1].encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["onnxruntime-web-9.8.7.tgz", "ort", "page"]


def test_no_onnxruntime_web(exported, fake_ort, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tgz").write_text("no archive")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(fake_ort / "package/dist" / ORT_FILES[0], f"package/dist/{ORT_FILES[0]}")
    shutil.copytree(fake_ort, tmp_path / "stranger")
    (tmp_path / "stranger/package/dist" / ORT_FILES[0]).write_text("export const something = 1;")
    for name, why in [
        ("missing", "does not exist"),
        ("empty", "no ort.wasm.min.mjs"),
        ("text.tgz", "not a readable archive"),
        ("other.tgz", "no dist/ort-wasm-simd"),
        ("stranger", "does not begin"),
    ]:
        with pytest.raises(DataError, match="is not onnxruntime-web") as error:
            build_web(exported.fixed.onnx, tmp_path / "page", ort_web=tmp_path / name)
        assert why in error.value.why
        assert not (tmp_path / "page").exists()


def test_npm_absent_and_npm_offline(exported, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="npm is not installed") as error:
            build_web(exported.fixed.onnx, tmp_path / "page")
        assert "--ort-web" in error.value.fix
    need("npm")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "1")
    with pytest.raises(ConfigError, match="npm could not fetch") as error:
        build_web(exported.fixed.onnx, tmp_path / "page")
    assert "ECONNREFUSED" in error.value.why
    assert not (tmp_path / "page").exists()


def test_no_segmentor(exported, fake_ort, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    silent = changed(exported.fixed.onnx, tmp_path / "silent.onnx", mean=None, std=None)
    renamed = changed(exported.features.onnx, tmp_path / "renamed.onnx", part="segmentor")
    many = changed(exported.mask.onnx, tmp_path / "many.onnx", classes=[str(i) for i in range(300)])
    for path, error, words in [
        (tmp_path / "none.onnx", DataError, "no file"),
        (tmp_path / "text.onnx", DataError, "not a usable .onnx"),
        (exported.features.onnx, ConfigError, "is a backbone"),
        (silent, ConfigError, "does not say how photos are normalised"),
        (many, ConfigError, "300 classes"),
    ]:
        with pytest.raises(error, match=words):
            build_web(path, tmp_path / "page", ort_web=fake_ort)
        assert not (tmp_path / "page").exists()
    assert contract_of(renamed)["output"] == "features"  # (N, D, h, w) cannot be told from logits


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        yield session


@pytest.fixture(scope="module")
def pages(exported, tmp_path_factory):
    """``pages(name)`` -> (folder, .onnx): the page of one kind of file, onnxruntime-web fetched once by npm."""
    folder = tmp_path_factory.mktemp("pages")

    def write(name):
        path = folder / f"{name}.onnx"
        if name == "dynamic":
            proto = load_proto(exported.mask.onnx)  # its inner tensor "logits" becomes the output
            logits = next(value for value in proto.graph.value_info if value.name == "logits")
            proto.graph.output[0].CopyFrom(logits)
            proto.graph.value_info.remove(logits)
            write_metadata(proto, {"resize": proto_metadata(proto)["resize"] | {"mode": "whole"}})
            save_proto(proto, path)
        elif name == "stretched":  # its contract tests whole photos at sizes this file cannot take
            changed(exported.fixed.onnx, path, resize={"scale": None, "mode": "whole", "align_corners": False})
        elif name == "fused":
            save_proto(apply_variants(load_proto(exported.fixed.onnx), ["attention", "pixels"]), path)
        else:
            shutil.copy(getattr(exported, name).onnx, path)
        return path

    def page(name):
        path = folder / f"{name}.onnx"
        if not path.exists():
            runtime = next((p for p in folder.iterdir() if p.is_dir()), None)  # a page holds the runtime, too
            try:
                build_web(write(name), folder / name, ort_web=runtime)
            except ConfigError as error:
                if os.environ.get("TINYMIM_REQUIRE_SHARED") or "npm" not in str(error):
                    raise
                pytest.skip(f"needs npm and its network: {error}")
        return folder / name, path

    return page


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory):
    """One CamVid photo: as PNG, as JPEG, as JPEG a camera held upright, and as PNG with transparent parts."""
    folder = tmp_path_factory.mktemp("photos")
    source = sorted((shared / "data/camvid/images/validation").glob("*.jpg"))[3]
    shutil.copy(source, folder / "street.jpg")
    with Image.open(source) as image:
        image.save(folder / "street.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by a quarter to see it upright
        image.resize((300, 200)).save(folder / "upright.jpg", exif=exif, quality=95)
        image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda v: 255 * (v > 99)))
        image.save(folder / "clear.png")
    return folder


def ready(browser, url):
    browser.open(url)
    browser.wait("return document.querySelector('#status').textContent === 'Ready.'")


def segment(browser, photo):
    """Choose a photo, wait for its mask, download it: uint8 (H, W)."""
    browser.type("#file", photo)
    browser.wait(
        f"return document.querySelector('#name').textContent === {photo.name!r}"
        " && document.querySelector('#status').textContent === ''"
    )
    name = f"{photo.stem}.mask.png"
    (browser.downloads / name).unlink(missing_ok=True)
    browser.click("#download")
    with Image.open(browser.downloaded(name)) as image:
        assert image.mode == "P"
        return np.asarray(image), image.getpalette()


def pythons(path, photo, **options):
    return Predictor(path, threads=1, **options).mask(read_photo(photo))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed", {}),  # windows of the file's size
        ("dynamic", {}),  # the whole photo at 512 pixels
        ("mask", {"mode": "whole"}),
        ("fused", {}),  # uint8 pixels in, MultiHeadAttention
        ("stretched", {"resize_to_file": True}),
    ],
)
def test_the_mask_is_pythons(browser, pages, photos, name, options):
    folder, path = pages(name)
    with served(folder) as (url, asked):
        ready(browser, url)
        mask, palette = segment(browser, photos / "street.png")
        wanted = pythons(path, photos / "street.png", **options)
        assert mask.shape == wanted.shape == (360, 480)
        assert (mask == wanted).mean() >= 0.999
        assert len(np.unique(mask)) >= 4
        assert palette[:21] == [value for colour in contract_of(path)["palette"] for value in colour]
        note = browser.js("return document.querySelector('#note').textContent")
        assert ("stretched" in note) == (name == "stretched")
        assert browser.console() == []
        assert {line.split()[1].lstrip("/") or "index.html" for line in asked} == ALL  # each is needed, no other is
        assert all(line.startswith("GET ") for line in asked)  # the photo goes nowhere


def test_jpeg_upright_and_transparent_photos(browser, pages, photos):
    folder, path = pages("mask")
    with served(folder) as (url, _):
        ready(browser, url)
        for name, size in [("street.jpg", (360, 480)), ("upright.jpg", (300, 200)), ("clear.png", (360, 480))]:
            mask, _ = segment(browser, photos / name)
            assert mask.shape == size
            assert (mask == pythons(path, photos / name, mode="whole")).mean() >= 0.99  # JPEG decoders differ a little


DROP = """
const [kind, name, type, bytes] = arguments;
const files = new DataTransfer();
files.items.add(new File([Uint8Array.from(bytes)], name, { type }));
document.dispatchEvent(kind === "drop" ? new DragEvent("drop", { dataTransfer: files, cancelable: true })
                                       : new ClipboardEvent("paste", { clipboardData: files }));
"""


def test_drop_paste_legend_slider_and_bad_files(browser, pages, photos, tmp_path):
    folder, _ = pages("mask")
    small = tmp_path / "small.png"
    with Image.open(photos / "street.png") as image:
        image.resize((120, 90)).save(small)
    with served(folder) as (url, _):
        ready(browser, url)
        browser.js(DROP, "drop", "notes.txt", "text/plain", [104, 105])
        assert "no photo" in browser.js("return document.querySelector('#status').textContent")
        browser.js(DROP, "drop", "broken.png", "image/png", [104, 105])
        browser.wait("return document.querySelector('#status').textContent.startsWith('broken.png could not be')")
        assert browser.js("return document.querySelector('#result').hidden")
        for kind in ("drop", "paste"):
            browser.js(DROP, kind, f"{kind}.png", "image/png", list(small.read_bytes()))
            browser.wait(f"return document.querySelector('#name').textContent === '{kind}.png'")
        buttons = "[...document.querySelectorAll('#classes button')]"
        rows = browser.js(f"return {buttons}.map((button) => button.innerText.split('\\n'))")
        shares = [float(share.strip("<% ")) for _, share in rows]
        assert shares == sorted(shares, reverse=True)
        assert 99 < sum(shares) < 101
        assert {name for name, _ in rows} <= set(CLASSES)
        colours = """
            const canvas = document.querySelector("#overlay");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(data).size;
        """
        before = browser.js(colours)
        browser.click("#classes button")
        assert browser.js("return document.querySelector('#classes button').ariaPressed") == "true"
        assert browser.js(colours) != before
        browser.js("const o = document.querySelector('#opacity'); o.value = 25; o.oninput()")
        assert browser.js("return getComputedStyle(document.querySelector('#overlay')).opacity") == "0.25"
        browser.resize(390, 844)
        assert browser.js("return document.documentElement.scrollWidth") <= 390
        browser.cdp("Emulation.clearDeviceMetricsOverride")


LOAD = """
const [address, mode] = arguments;
const source = `fetch("${address}", { mode: "${mode}" })
  .then(() => postMessage("loaded"), () => postMessage("refused"))`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
const script = document.createElement("script");
const tag = new Promise((done) => { script.onload = () => done("loaded"); script.onerror = () => done("refused"); });
script.src = address;
document.head.append(script);
return Promise.all([
  fetch(address, { mode }).then(() => "loaded", () => "refused"),
  new Promise((done) => (worker.onmessage = (event) => done(event.data))),
  tag,
]);
"""


def test_the_page_and_its_worker_can_load_nothing_from_elsewhere(browser, pages, tmp_path):
    folder, _ = pages("mask")
    (tmp_path / "elsewhere.js").write_text("")
    with served(folder) as (url, _), served(tmp_path) as (other, asked):
        ready(browser, url)
        assert browser.js(LOAD, f"{other}elsewhere.js", "no-cors") == ["refused"] * 3
        assert asked == []
        assert browser.js(LOAD, f"{url}page.css", "cors")[:2] == ["loaded"] * 2
        browser.console()


def test_threads_where_the_server_isolates_the_page(browser, pages, photos):
    folder, path = pages("mask")
    isolate = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    with served(folder, isolate) as (url, _):
        ready(browser, url)
        mask, _ = segment(browser, photos / "street.png")
        assert (mask == pythons(path, photos / "street.png", mode="whole")).mean() >= 0.999
        threads = browser.js("return Math.min(navigator.hardwareConcurrency, 8)")
        assert browser.js("return document.querySelector('#threads').textContent").startswith(f"on {threads} thread")


def test_a_missing_file_is_said(browser, pages, tmp_path):
    folder, _ = pages("mask")
    shutil.copytree(folder, tmp_path / "page")
    (tmp_path / "page/model.onnx").write_bytes(b"no model")
    with served(tmp_path / "page") as (url, _):
        browser.open(url)
        browser.wait("return document.querySelector('#status').textContent.startsWith('The model could not be opened')")
    browser.console()
