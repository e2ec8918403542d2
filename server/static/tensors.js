// Requests of the page: begun with zeros of each input's shape, 1 where it leaves a size open, or with the data of a
// file, and sent in binary.

const WRITTEN = 256; // values that are written out; more are the word "zeros"
const WORD = "zeros";
const SHORT = 64 * 1024; // characters of a request that is sent as it was written
const MOST = 64 * 2 ** 20; // bytes of a request that the server takes

const EMPTY = { BOOL: false, BYTES: "" };
const SIZES = { BOOL: 1, INT8: 1, UINT8: 1, INT16: 2, UINT16: 2, FP16: 2, BF16: 2, INT64: 8, UINT64: 8, FP64: 8 };
const SIZE = 4; // of the others, and of the length before a text
const ARRAYS = {
  INT8: Int8Array, UINT8: Uint8Array, INT16: Int16Array, UINT16: Uint16Array, INT32: Int32Array, UINT32: Uint32Array,
  FP32: Float32Array, FP64: Float64Array,
}; // little-endian, as the protocol is, wherever browsers run
const LONG = { INT64: BigInt64Array, UINT64: BigUint64Array };
const WITHOUT_JSON = ["FP16", "BF16"];

export function request(inputs) {
  const tensors = inputs.map(({ name, datatype, shape }) => {
    const sizes = shape.map((size) => (size < 0 ? 1 : size));
    const short = volume(sizes) <= WRITTEN && !WITHOUT_JSON.includes(datatype);
    return { name, datatype, shape: sizes, data: short ? new Array(volume(sizes)).fill(EMPTY[datatype] ?? 0) : WORD };
  });
  return written(tensors);
}

// A request as text, an input in each line.
export function written(tensors) {
  const text = tensors.map((tensor) => `  {${Object.entries(tensor).map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`).join(", ")}}`);
  return `{"inputs": [\n${text.join(",\n")}\n]}`;
}

// The body and header fields for what was written: a short text as it is, whose long integers must not be rounded,
// else its tensors in binary. The data of an input may be the name of a file, whose bytes are in `files`. Throws SyntaxError for what is no JSON, RangeError for what cannot be sent.
export function sent(text, files = new Map()) {
  const written = JSON.parse(text);
  const inputs = Array.isArray(written?.inputs) ? written.inputs : [];
  const hasZeros = inputs.some((input) => input?.data === WORD || files.has(input?.data));
  if (!hasZeros && text.length <= SHORT) return { body: text };
  const data = inputs.map((input) => files.get(input?.data) ?? binary(input));
  if (!hasZeros && data.includes(null)) return { body: text }; // the server says what is wrong with it
  const head = new TextEncoder().encode(JSON.stringify({ ...written, inputs: inputs.map((input, at) => without(input, data[at])) }));
  const headers = { "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": String(head.length) };
  return { body: new Blob([head, ...data.filter(Boolean)]), headers };
}

// An input as it is beside its binary data.
function without(input, data) {
  if (data === null) {
    if (JSON.stringify(input).search(/(?<![.0-9])[0-9]{16}/) >= 0) throw new RangeError(`a number of ${input?.name} may be too long for this page; write out the zeros`);
    return input;
  }
  const { data: _, ...rest } = input;
  return { ...rest, parameters: { ...rest.parameters, binary_data_size: data.byteLength } };
}

// An input's data in binary; null for what has to stay JSON.
function binary(input) {
  if (!Array.isArray(input?.shape)) return null;
  const { name, datatype, shape, data } = input;
  if (data === WORD) {
    const bytes = volume(shape) * (SIZES[datatype] ?? SIZE);
    if (!(bytes <= MOST)) throw new RangeError(`the shape of ${name} is too large to send`);
    return new Uint8Array(bytes); // zeros of any datatype, and texts of length 0
  }
  return fits(data, [volume(shape)]) || fits(data, shape) ? packed(datatype, data.flat(Infinity)) : null;
}

function fits(data, [size, ...rest]) {
  if (!Array.isArray(data) || data.length !== size) return false;
  return rest.length ? data.every((part) => fits(part, rest)) : !data.some(Array.isArray);
}

function packed(datatype, values) {
  const all = (kind) => values.every((value) => typeof value === kind);
  if (datatype === "BOOL") return all("boolean") ? Uint8Array.from(values, Number) : null;
  if (datatype === "BYTES") return all("string") ? texts(values) : null;
  if (!all("number")) return null;
  if (datatype in LONG) return values.every((value) => Number.isSafeInteger(value) && (value >= 0 || datatype === "INT64")) ? LONG[datatype].from(values, BigInt) : null;
  const array = ARRAYS[datatype]?.from(values);
  const same = datatype === "FP32" ? array.every(Number.isFinite) : array?.every((value, at) => value === values[at]);
  return same ? array : null;
}

function texts(values) {
  const encoded = values.map((value) => new TextEncoder().encode(value));
  const found = new Uint8Array(encoded.reduce((sum, each) => sum + SIZE + each.length, 0));
  let start = 0;
  for (const each of encoded) {
    new DataView(found.buffer).setUint32(start, each.length, true);
    found.set(each, start + SIZE);
    start += SIZE + each.length;
  }
  return found;
}

const volume = (shape) => shape.reduce((product, size) => product * size, 1);

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
  if (data.length === shape.at(-1)) {
    const best = data.map((value, at) => [value, at]).sort((a, b) => b[0] - a[0]).slice(0, BEST);
    return `largest: ${best.map(([value, at]) => `${short(value)} at ${at}`).join(", ")}`;
  }
  const [least, most] = data.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  return `${data.length} values from ${short(least)} to ${short(most)}`;
}
