// The network's thread, so that the page stays alive while it computes: photo in, mask and times out.
import * as ort from "./ort.wasm.min.mjs";
import { segment } from "./segment.mjs";

let contract, session;

const tasks = {
  /** Fetch and open the model; answers with what the page shows about it. */
  async open({ folder }) {
    contract = await (await fetch(new URL("contract.json", folder))).json();
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
    session = await ort.InferenceSession.create(new URL("model.onnx", folder).href, { executionProviders: ["wasm"] });
    return { contract, threads: ort.env.wasm.numThreads };
  },

  /** Segment one photo file; answers with mask, size, milliseconds and the photo itself to show. */
  async segment({ photo }) {
    const began = performance.now();
    const bitmap = await createImageBitmap(photo, {
      imageOrientation: "from-image", // as a camera holds it
      colorSpaceConversion: "none", // the values in the file, as Python reads them
      premultiplyAlpha: "none",
    });
    const { width, height } = bitmap;
    const surface = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    surface.fillStyle = "white"; // what is transparent shows white, as in Python
    surface.fillRect(0, 0, width, height);
    surface.drawImage(bitmap, 0, 0);
    const { data } = surface.getImageData(0, 0, width, height);
    let network = 0;
    const run = async (image, size) => {
      const start = performance.now();
      const type = contract.range === "pixels" ? "uint8" : "float32";
      const feeds = { [contract.input]: new ort.Tensor(type, image, [1, 3, ...size]) };
      const output = (await session.run(feeds, [contract.output]))[contract.output];
      network += performance.now() - start;
      return output;
    };
    const result = await segment(contract, data, [height, width], run);
    return { ...result, width, height, network, whole: performance.now() - began, bitmap };
  },
};

onmessage = async ({ data }) => {
  try {
    const answer = await tasks[data.task](data);
    const moved = answer.bitmap ? [answer.bitmap, answer.mask.buffer] : [];
    postMessage(answer, moved);
  } catch (error) {
    postMessage({ error: error?.message ?? String(error) });
  }
};
