// A request to begin with: each input that a model takes, all zeros, and 1 where its shape leaves the size open.

const WRITTEN = 256; // values that are written out; more are the word "zeros"
const WORD = "zeros";
const MOST = 20_000_000; // as many numbers are no request any more, and would end this page

const EMPTY = { BOOL: false, BYTES: "" };

export function request(inputs) {
  const tensors = inputs.map(({ name, datatype, shape }) => {
    const sizes = shape.map((size) => (size < 0 ? 1 : size));
    return { name, datatype, shape: sizes, data: volume(sizes) <= WRITTEN ? zeros(datatype, sizes) : WORD };
  });
  const text = tensors.map((tensor) => `  {${Object.entries(tensor).map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`).join(", ")}}`);
  return `{"inputs": [\n${text.join(",\n")}\n]}`;
}

// What is sent for what was written: the very text, whose long integers must not be rounded, unless there are
// zeros to write out. Throws SyntaxError for what is no JSON, RangeError for more than can be sent.
export function sent(text) {
  const body = JSON.parse(text);
  const toWrite = Array.isArray(body?.inputs) && body.inputs.some((input) => input?.data === WORD);
  return toWrite ? JSON.stringify(withZeros(body)) : text;
}

function withZeros(body) {
  for (const input of body.inputs) {
    if (input?.data !== WORD || !Array.isArray(input.shape)) continue;
    if (!(volume(input.shape) <= MOST)) throw new RangeError(`the shape of ${input.name} is too large to write out`);
    input.data = zeros(input.datatype, input.shape);
  }
  return body;
}

const volume = (shape) => shape.reduce((product, size) => product * size, 1);

const zeros = (datatype, shape) => new Array(volume(shape)).fill(EMPTY[datatype] ?? 0);
