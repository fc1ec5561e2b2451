// From a photo to its mask, without the page: the arithmetic of `tinymim predict`, so that both give the same mask.
// Sizes are [height, width]; photos are uint8 RGB, row by row (H, W, 3); images, logits are planes (C, H, W) as for the
// network. The contract is contract.json.

/**
 * A photo's class ids at its own size, in MMSegmentation's order: resize, normalise, pad, network (whole, or window by
 * window with the logits averaged), padding off, logits to the photo's size, decision.
 *
 * rgba: the photo's pixels. photo: its size. run: async (image, size) -> tensor {data, dims, type} for a batch of one.
 */
export async function segment(contract, rgba, photo, run) {
  const { size, inner, windows, note } = plan(contract, photo);
  const image = toImage(contract, resizePixels(dropAlpha(rgba), photo, inner), inner, size);
  let sum, count, C;
  for (const window of windows) {
    const [top, left, h, w] = window;
    const tensor = await run(cut(image, size, window), [h, w]);
    if (tensor.type !== "float32") {
      const ids = resizeNearest(Uint8Array.from(tensor.data, Number), tensor.dims.slice(-2), [h, w]);
      return { mask: resizeNearest(cut(ids, size, [0, 0, ...inner]), inner, photo), size, windows: 1, note };
    }
    C = tensor.dims[1];
    const logits = resizeLogits(tensor.data, tensor.dims.slice(1), [h, w], contract.align_corners);
    if (windows.length === 1) {
      sum = logits;
      break;
    }
    sum ??= new Float32Array(C * size[0] * size[1]);
    count ??= new Uint16Array(size[0] * size[1]);
    for (let i = 0, c = 0; c < C; c++) {
      for (let y = top; y < top + h; y++) {
        const to = (c * size[0] + y) * size[1];
        for (let x = left; x < left + w; x++) sum[to + x] += logits[i++];
      }
    }
    for (let y = top; y < top + h; y++) for (let x = left; x < left + w; x++) count[y * size[1] + x]++;
  }
  if (count) for (let i = 0; i < sum.length; i++) sum[i] /= count[i % count.length];
  if (!sum.every(Number.isFinite)) throw new Error("the file gives values that are not numbers (an overflow?)");
  const mask = decide(cut(sum, size, [0, 0, ...inner]), [C, ...inner], photo, contract);
  return { mask, size, windows: windows.length, note };
}

/**
 * How a photo goes to the network: `inner`, the size it is resized to; `size`, with padding below and to the right;
 * `windows`, [top, left, height, width] each. A file of fixed size that its contract does not fit gets the photo
 * stretched to that size (as `tinymim predict --resize-to-file`), and `note` says so.
 */
export function plan(contract, photo) {
  const inner = resizedSize(contract, photo);
  const size = paddedSize(contract, inner);
  const windows = contract.mode === "slide" ? slideWindows(size, contract.crop, contract.stride) : [[0, 0, ...size]];
  const fits = ([, , ...sides]) => sides.every((side, i) => (contract.size[i] ?? side) === side);
  if (windows.every(fits)) return { inner, size, windows, note: "" };
  const fixed = contract.size.map((side, i) => side ?? size[i]);
  const note = `The photo was stretched to ${fixed[1]} x ${fixed[0]}, the fixed size of this file.`;
  return { inner: fixed, size: fixed, windows: [[0, 0, ...fixed]], note };
}

/** The contract's resize rule. */
export function resizedSize({ scale, keep_ratio: keepRatio }, [height, width]) {
  if (!scale) return [height, width];
  if (!keepRatio) return [scale[1], scale[0]];
  const factor = Math.min(
    Math.max(...scale) / Math.max(height, width),
    Math.min(...scale) / Math.min(height, width),
  );
  return [height, width].map((side) => Math.max(Math.floor(side * factor + 0.5), 1));
}

function paddedSize({ pad }, sides) {
  if (!pad) return sides;
  const divisor = pad.size_divisor;
  return sides.map((side, i) => (divisor ? Math.ceil(side / divisor) * divisor : Math.max(side, pad.size[i])));
}

/** Windows that cover an image, as MMSegmentation's slide mode lays them: the last ones end at the border. */
export function slideWindows(size, crop, stride) {
  const [rows, columns] = size.map((side, i) => {
    const count = Math.floor(Math.max(side - crop[i] + stride[i] - 1, 0) / stride[i]) + 1;
    return Array.from({ length: count }, (_, k) => Math.max(Math.min(k * stride[i], side - crop[i]), 0));
  });
  const [h, w] = size.map((side, i) => Math.min(side, crop[i]));
  return rows.flatMap((top) => columns.map((left) => [top, left, h, w]));
}

/** Part [top, left, height, width] of planes. */
export function cut(planes, [H, W], [top, left, h, w]) {
  if (h === H && w === W) return planes;
  const C = planes.length / (H * W);
  const out = new planes.constructor(C * h * w);
  for (let c = 0, o = 0; c < C; c++) {
    for (let y = top; y < top + h; y++, o += w) {
      const from = (c * H + y) * W + left;
      out.set(planes.subarray(from, from + w), o);
    }
  }
  return out;
}

/** The drawing surface's RGBA without the A. */
export function dropAlpha(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4, j += 3) {
    rgb[j] = rgba[i];
    rgb[j + 1] = rgba[i + 1];
    rgb[j + 2] = rgba[i + 2];
  }
  return rgb;
}

/** Pixels of size `inner` as the network takes them: uint8, or normalised float32; padding up to `size`. */
export function toImage(contract, pixels, [h, w], [H, W]) {
  const raw = contract.range === "pixels";
  const out = raw ? new Uint8Array(3 * H * W) : new Float32Array(3 * H * W);
  for (let c = 0; c < 3; c++) {
    const [mean, std] = [Math.fround(contract.mean?.[c] ?? 0), Math.fround(contract.std?.[c] ?? 1)];
    const values = Array.from({ length: 256 }, (_, v) => (raw ? v : Math.fround(Math.fround(v - mean) / std)));
    if (contract.pad) {
      const value = contract.pad.value[c]; // in normalised units
      const level = Math.min(Math.max(roundEven(Math.fround(mean + Math.fround(value * std))), 0), 255);
      out.fill(raw ? level : value, c * H * W, (c + 1) * H * W);
    }
    for (let y = 0, i = c; y < h; y++) {
      for (let x = 0, o = (c * H + y) * W; x < w; x++, i += 3) out[o++] = values[pixels[i]];
    }
  }
  return out;
}

/** Source positions and 11-bit weights along one side. */
function taps(from, to, clampWeights) {
  const scale = 1 / (to / from);
  const [first, second] = [new Int32Array(to), new Int32Array(to)];
  const [a, b] = [new Int32Array(to), new Int32Array(to)];
  for (let i = 0; i < to; i++) {
    const at = Math.fround((i + 0.5) * scale - 0.5);
    const floor = Math.floor(at);
    let part = Math.fround(at - floor);
    if (clampWeights && (floor < 0 || floor >= from - 1)) part = 0;
    first[i] = Math.min(Math.max(floor, 0), from - 1);
    second[i] = Math.min(Math.max(floor + 1, 0), from - 1);
    a[i] = roundEven(Math.fround(Math.fround(1 - part) * 2048));
    b[i] = roundEven(Math.fround(part * 2048));
  }
  return { first, second, a, b };
}

function roundEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

/** Bilinear as OpenCV does it for uint8 (INTER_LINEAR), bit for bit; a canvas would interpolate differently. */
export function resizePixels(pixels, [height, width], [H, W]) {
  if (H === height && W === width) return pixels;
  const out = new Uint8Array(H * W * 3);
  const row = width * 3;
  if (height === 2 * H && width === 2 * W) {
    for (let y = 0, o = 0; y < H; y++) {
      for (let x = 0; x < W; x++) {
        for (let c = 0; c < 3; c++) {
          const i = 2 * y * row + 6 * x + c;
          out[o++] = (pixels[i] + pixels[i + 3] + pixels[i + row] + pixels[i + row + 3] + 2) >> 2;
        }
      }
    }
    return out;
  }
  const [tx, ty] = [taps(width, W, true), taps(height, H, false)];
  const stretched = new Map(); // source row -> the row at the new width, times 2048 / 16
  const stretch = (y) => {
    let line = stretched.get(y);
    if (!line) {
      line = new Int32Array(W * 3);
      for (let x = 0; x < W; x++) {
        const [p, q] = [y * row + 3 * tx.first[x], y * row + 3 * tx.second[x]];
        for (let c = 0; c < 3; c++) line[3 * x + c] = (pixels[p + c] * tx.a[x] + pixels[q + c] * tx.b[x]) >> 4;
      }
      for (const old of stretched.keys()) if (old < y - 1) stretched.delete(old);
      stretched.set(y, line);
    }
    return line;
  };
  for (let y = 0, o = 0; y < H; y++) {
    const [up, low, a, b] = [stretch(ty.first[y]), stretch(ty.second[y]), ty.a[y], ty.b[y]];
    for (let i = 0; i < W * 3; i++) out[o++] = (((up[i] * a) >> 16) + ((low[i] * b) >> 16) + 2) >> 2;
  }
  return out;
}

/** Logits at another size, bilinear as torch does it, one row after the other: each (C, W). */
function* resizedRows(logits, [C, h, w], [H, W], alignCorners) {
  const [tx, ty] = [floatTaps(w, W, alignCorners), floatTaps(h, H, alignCorners)];
  const lines = new Map(); // row of the logits -> (C, W), at the new width
  const stretch = (y) => {
    let line = lines.get(y);
    if (!line) {
      line = new Float32Array(C * W);
      for (let c = 0, o = 0; c < C; c++) {
        const start = (c * h + y) * w;
        for (let x = 0; x < W; x++, o++) {
          line[o] = lerp(logits[start + tx.first[x]], logits[start + tx.second[x]], tx.a[x], tx.b[x]);
        }
      }
      for (const old of lines.keys()) if (old < y - 1) lines.delete(old);
      lines.set(y, line);
    }
    return line;
  };
  const row = new Float32Array(C * W);
  for (let y = 0; y < H; y++) {
    const [up, low, a, b] = [stretch(ty.first[y]), stretch(ty.second[y]), ty.a[y], ty.b[y]];
    for (let i = 0; i < row.length; i++) row[i] = lerp(up[i], low[i], a, b);
    yield row;
  }
}

/** Logits (C, h, w) -> (C, H, W). */
export function resizeLogits(logits, [C, h, w], [H, W], alignCorners) {
  if (h === H && w === W) return logits;
  const out = new Float32Array(C * H * W);
  let y = 0;
  for (const row of resizedRows(logits, [C, h, w], [H, W], alignCorners)) {
    for (let c = 0; c < C; c++) out.set(row.subarray(c * W, (c + 1) * W), (c * H + y) * W);
    y++;
  }
  return out;
}

/** Logits (C, h, w), resized to the photo -> the largest of each pixel, or the threshold where there is one channel. */
export function decide(logits, shape, [H, W], { align_corners: alignCorners, threshold }) {
  const C = shape[0];
  const mask = new Uint8Array(H * W);
  const best = new Float32Array(W);
  let start = 0;
  for (const row of resizedRows(logits, shape, [H, W], alignCorners)) {
    best.set(row.subarray(0, W));
    for (let c = 1, i = W; c < C; c++) {
      for (let x = 0; x < W; x++, i++) {
        if (row[i] > best[x]) {
          best[x] = row[i];
          mask[start + x] = c;
        }
      }
    }
    if (C === 1) for (let x = 0; x < W; x++) mask[start + x] = 1 / (1 + Math.exp(-best[x])) > threshold ? 1 : 0;
    start += W;
  }
  return mask;
}

/** A mask at another size: the nearest id, none is mixed. */
export function resizeNearest(mask, [height, width], [H, W]) {
  if (height === H && width === W) return mask;
  const out = new Uint8Array(H * W);
  for (let y = 0, o = 0; y < H; y++) {
    const row = Math.floor((y * height) / H) * width;
    for (let x = 0; x < W; x++) out[o++] = mask[row + Math.floor((x * width) / W)];
  }
  return out;
}

function lerp(p, q, a, b) {
  return Math.fround(Math.fround(p * a) + Math.fround(q * b));
}

/** The two source indices of every target value along one side and their float32 weights, as torch computes them. */
function floatTaps(from, to, alignCorners) {
  const scale = alignCorners ? Math.fround(to > 1 ? (from - 1) / (to - 1) : 0) : Math.fround(from / to);
  const [first, second] = [new Int32Array(to), new Int32Array(to)];
  const [a, b] = [new Float32Array(to), new Float32Array(to)];
  for (let i = 0; i < to; i++) {
    const at = Math.max(alignCorners ? Math.fround(i * scale) : Math.fround(Math.fround((i + 0.5) * scale) - 0.5), 0);
    first[i] = Math.min(Math.floor(at), from - 1);
    second[i] = Math.min(first[i] + 1, from - 1);
    b[i] = Math.min(Math.max(at - first[i], 0), 1);
    a[i] = 1 - b[i];
  }
  return { first, second, a, b };
}
