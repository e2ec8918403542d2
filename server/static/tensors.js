// Tensors of the page's requests: zeros or ones of the shape that the server found to work, 1 where it found none, or the
// data of a file: a NumPy array (.npy), or an image, scaled and laid out as the model's input wants it. Shapes as text,
// and answers at a glance.

import { oneLine } from "./format.js";

const WRITTEN = 256; // values that are written out; more are the word "zeros" or "ones"
const FILLS = ["zeros", "ones"];
export const MOST = 64 * 2 ** 20; // bytes of a request that the server takes by default

const FILLED = { BOOL: [false, true], BYTES: ["", ""] }; // by FILLS
const ONES = { FP16: [0, 60], BF16: [128, 63], FP32: [0, 0, 128, 63], FP64: [0, 0, 0, 0, 0, 0, 240, 63], BYTES: [0] }; // in binary
const SIZES = { BOOL: 1, INT8: 1, UINT8: 1, INT16: 2, UINT16: 2, FP16: 2, BF16: 2, INT64: 8, UINT64: 8, FP64: 8 };
const SIZE = 4; // of the others, and of the length before a text
export const WITHOUT_JSON = ["FP16", "BF16"];

const volume = (shape) => shape.reduce((product, size) => product * size, 1);

// The bytes of numbers, or of texts of length 0.
export const byteSize = ({ datatype, shape }) => volume(shape) * (SIZES[datatype] ?? SIZE);

// The bytes of a zero or a one, little-endian; of a text, always of length 0.
export function elementBytes(datatype, fill) {
  const one = fill === "ones" ? ONES[datatype] ?? [1] : [];
  return [...one, ...new Array((SIZES[datatype] ?? SIZE) - one.length).fill(0)];
}

// The inputs that a request needs as tensors: {name, datatype, shape, data}.
export function exampleTensors(inputs) {
  return inputs.filter(({ optional }) => !optional).map(({ name, datatype, shape, example }) => {
    const sizes = example?.shape ?? shape.map((size) => (size < 0 ? 1 : size)), fill = example?.values ?? "zeros";
    const isShort = volume(sizes) <= WRITTEN && !WITHOUT_JSON.includes(datatype), value = (FILLED[datatype] ?? [0, 1])[FILLS.indexOf(fill)];
    return { name, datatype, shape: sizes, data: isShort ? new Array(volume(sizes)).fill(value) : fill };
  });
}

// A shape with the names of the sizes that the model leaves open: [batch, 3, height, -1].
export function shapeText({ shape, dimensions }) {
  return `[${shape.map((size, at) => (size < 0 && dimensions?.[at] ? oneLine(dimensions[at], 60) : size)).join(", ")}]`;
}

// Which sizes are guesses, and why; "" if the model answered what the server tried.
export function guessText(inputs) {
  const refused = inputs.filter(({ example }) => example?.refusal), said = new Set(refused.map(({ example }) => oneLine(example.refusal)));
  const guesses = refused.map(({ name, shape, dimensions }) => {
    const open = shape.flatMap((size, at) => (size < 0 ? [oneLine(dimensions?.[at] || `dimension ${at + 1}`, 60)] : []));
    return open.length ? `${open.join(", ")} of ${oneLine(name, 60)}` : null;
  }).filter(Boolean).join("; ");
  return refused.length ? `The answer may be a refusal${guesses && ` (sizes are guesses: ${guesses})`}: ${[...said].join("; ")}` : "";
}

// A request as text, an input in each line.
export function requestText(tensors) {
  const text = tensors.map((tensor) => `  {${Object.entries(tensor).map(([name, value]) => `${JSON.stringify(name)}: ${stringify(value)}`).join(", ")}}`);
  return `{"inputs": [\n${text.join(",\n")}\n]}`;
}

// The value of a JSON text, which may have NaN, Infinity and -Infinity, as tensors do.
export function parseTensors(text) {
  try {
    return JSON.parse(text);
  } catch {
    const quoted = text.replace(/"(?:[^"\\]|\\.)*"|-?\b(?:NaN|Inf(?:inity)?)\b/g, (each) => (each[0] === '"' ? each : `"\\u0000${each}"`));
    return JSON.parse(quoted, (_, value) => (typeof value === "string" && value[0] === "\0" ? Number(value.slice(1).replace(/Inf$/, "Infinity")) : value));
  }
}

// The text of a value that `parseTensors` reads.
function stringify(value) {
  const quoted = JSON.stringify(value, (_, each) => (typeof each === "number" && !Number.isFinite(each) ? `\0${each}` : each));
  return quoted.replace(/"\\u0000(NaN|-?Infinity)"/g, "$1");
}

// The body and header fields for a request's text. It is sent as it is, so that long integers are not rounded; zeros, ones,
// and inputs whose data is the name of a file in `files`, in binary. Throws SyntaxError for what is no JSON, RangeError for
// what cannot be sent.
export function encodeRequest(text, files = new Map()) {
  const request = parseTensors(text);
  const inputs = Array.isArray(request?.inputs) ? request.inputs : [];
  const data = inputs.map((input) => files.get(input?.data) ?? (FILLS.includes(input?.data) ? filled(input) : null));
  if (data.every((each) => each === null)) return { body: text };
  const head = new TextEncoder().encode(stringify({ ...request, inputs: inputs.map((input, at) => withoutData(input, data[at])) }));
  const headers = { "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": String(head.length) };
  return { body: new Blob([head, ...data.filter(Boolean)]), headers };
}

function filled(input) {
  if (!Array.isArray(input.shape)) return null; // the server says what is wrong with it
  const size = byteSize(input), element = elementBytes(input.datatype, input.data);
  if (!(size <= MOST)) throw new RangeError(`the shape of ${input.name} is too large to send`);
  const bytes = new Uint8Array(size);
  if (size) bytes.set(element);
  for (let done = element.length; done < size; done *= 2) bytes.copyWithin(done, 0, done);
  return bytes;
}

// An input as it is beside its binary data.
function withoutData(input, data) {
  if (data === null) {
    if (JSON.stringify(input).search(/(?<![.0-9])[0-9]{16}/) >= 0) throw new RangeError(`a number of ${input?.name} may be too long for this page; write out the zeros`);
    return input;
  }
  const { data: _, ...rest } = input;
  return { ...rest, parameters: { ...rest.parameters, binary_data_size: data.byteLength } };
}

const MAGIC = "\u0093NUMPY";
const TYPES = {
  "|b1": "BOOL", "|i1": "INT8", "|u1": "UINT8", "<i2": "INT16", "<u2": "UINT16", "<i4": "INT32", "<u4": "UINT32",
  "<i8": "INT64", "<u8": "UINT64", "<f2": "FP16", "<f4": "FP32", "<f8": "FP64",
};
const MEANS = [0.485, 0.456, 0.406], DEVIATIONS = [0.229, 0.224, 0.225]; // of ImageNet, as most vision models were trained
const MOST_PIXELS = 16e6; // 64 MB of FP32 of one channel: more does not fit into a request

export const SCALES = { unit: "0 to 1", byte: "0 to 255", imagenet: "ImageNet's mean and deviation" };

// Reads a file for an input. Returns {datatype, shape, data, said}; throws RangeError with what is wrong, for people.
export async function readTensor(file, input, scale) {
  if (/\.npy$/i.test(file.name)) return fitted(npy(await file.arrayBuffer()), input);
  if (file.type.startsWith("image/")) return image(file, input, scale);
  throw new RangeError("choose a .npy array or an image");
}

// A .npy file, of the format's versions 1 to 3.
export function npy(buffer) {
  const view = new DataView(buffer), text = (from, to) => new TextDecoder("latin1").decode(buffer.slice(from, to));
  if (buffer.byteLength < 12 || ![...MAGIC].every((letter, at) => letter.charCodeAt(0) === view.getUint8(at))) throw new RangeError("this is no .npy file");
  const isLong = view.getUint8(6) > 1, start = isLong ? 12 : 10;
  const end = start + (isLong ? view.getUint32(8, true) : view.getUint16(8, true));
  const head = text(start, end);
  const descr = /'descr':\s*'([^']+)'/.exec(head)?.[1], shape = /'shape':\s*\(([^)]*)\)/.exec(head)?.[1];
  if (descr === undefined || shape === undefined) throw new RangeError("its header cannot be read: save one array, without fields");
  if (!(descr in TYPES)) throw new RangeError(`its type ${descr} cannot be sent: save numbers or booleans, little-endian`);
  if (/'fortran_order':\s*True/.test(head)) throw new RangeError("it is in Fortran order: save numpy.ascontiguousarray(array)");
  const sizes = shape.split(",").map((size) => size.trim()).filter(Boolean).map(Number);
  return { datatype: TYPES[descr], shape: sizes, data: new Uint8Array(buffer, end), said: `${TYPES[descr]} [${sizes.join(", ")}]` };
}

// An array of another precision becomes what the input takes; anything else the server refuses by name.
function fitted(array, { datatype }) {
  if (array.datatype !== "FP64" || datatype !== "FP32") return array;
  const values = Float32Array.from(new Float64Array(array.data.slice().buffer));
  return { ...array, datatype, data: new Uint8Array(values.buffer), said: `${array.said}, sent as FP32` };
}

// Where an input has its channels, height and width; null for what is no image.
export function layoutOf(shape) {
  const sizes = shape.slice(-3), isChannels = (size) => size === 1 || size === 3;
  if (shape.length < 3 || shape.length > 4) return null;
  if (isChannels(sizes[0])) return { channels: sizes[0], height: sizes[1], width: sizes[2], first: true };
  if (isChannels(sizes[2])) return { channels: sizes[2], height: sizes[0], width: sizes[1], first: false };
  return null;
}

async function image(file, input, scale) {
  const { name, datatype, shape } = input, layout = layoutOf(shape);
  if (layout === null) throw new RangeError(`${name} has the shape ${shapeText(input)}, which is no image of 1 or 3 channels`);
  if (!["FP32", "UINT8"].includes(datatype)) throw new RangeError(`${name} takes ${datatype}: an image can be sent as FP32 or UINT8; save a .npy array`);
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new RangeError("the browser cannot read this image");
  });
  const height = layout.height > 0 ? layout.height : bitmap.height, width = layout.width > 0 ? layout.width : bitmap.width;
  if (height * width > MOST_PIXELS) throw new RangeError(`${width} × ${height} pixels are too many for one request`);
  const canvas = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0, width, height);
  const pixels = canvas.getImageData(0, 0, width, height).data;
  const values = laidOut(pixels, layout, datatype === "UINT8" ? "byte" : scale, datatype === "UINT8" ? Uint8Array : Float32Array);
  const sizes = layout.first ? [layout.channels, height, width] : [height, width, layout.channels];
  const colours = layout.channels === 3 ? "RGB" : "grey", scaled = datatype === "UINT8" ? SCALES.byte : SCALES[scale];
  return {
    datatype, shape: shape.length === 4 ? [1, ...sizes] : sizes, data: new Uint8Array(values.buffer),
    said: `${bitmap.width} × ${bitmap.height} pixels, scaled to ${width} × ${height}, ${colours}, ${scaled}`,
  };
}

// Pixels of four bytes as channels; grey by the weights of BT.601, as most programs have it.
export function laidOut(pixels, { channels, first }, scale, Kind) {
  const count = pixels.length / 4, values = new Kind(count * channels);
  for (let at = 0; at < count; at++) {
    const colour = pixels.subarray(at * 4, at * 4 + 3);
    const parts = channels === 3 ? colour : [0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]];
    for (let channel = 0; channel < channels; channel++) {
      const value = scale === "byte" ? parts[channel] : parts[channel] / 255;
      values[first ? channel * count + at : at * channels + channel] = scale === "imagenet" ? (value - MEANS[channel]) / DEVIATIONS[channel] : value;
    }
  }
  return values;
}

// What an answer says at a glance: of each output its values if they are few, else the largest, or their range.
export function overview(outputs) {
  return outputs.map(({ name, datatype, shape, data }) => ({ what: `${name}: ${datatype} [${shape.join(", ")}]`, values: glance(shape, data) }));
}

const FEW = 8, BEST = 5;
const short = (value) => (typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(4)) : value);

function glance(shape, data) {
  if (!Array.isArray(data)) return "";
  if (data.length <= FEW) return data.map(short).join(", ");
  if (!data.every((value) => typeof value === "number")) return `${data.length} values`;
  const numbers = data.map((value, at) => [value, at]).filter(([value]) => !Number.isNaN(value));
  if (data.length === shape.at(-1)) {
    const best = numbers.sort((a, b) => (a[0] < b[0]) - (a[0] > b[0])).slice(0, BEST); // two infinities have no difference
    return `largest: ${best.map(([value, at]) => `${short(value)} at ${at}`).join(", ")}`;
  }
  const [least, most] = numbers.reduce(([low, high], [value]) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  return `${data.length} values from ${short(least)} to ${short(most)}`;
}
