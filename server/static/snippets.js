// How a model is asked from elsewhere: with curl, with the project's own client, and with Triton's.

const FEW = 256; // values that are written out
const NUMPY = {
  BOOL: "bool_", INT8: "int8", UINT8: "uint8", INT16: "int16", UINT16: "uint16", INT32: "int32", UINT32: "uint32", INT64: "int64",
  UINT64: "uint64", FP16: "float16", FP32: "float32", FP64: "float64", BYTES: "object_",
};
const EMPTY = { BOOL: false, BYTES: "" };

// `inputs` are those of the metadata; -1 in a shape becomes 1. Returns [{name, text}], each complete.
export function snippets(origin, modelId, inputs) {
  const tensors = inputs.map((input) => ({ ...input, shape: input.shape.map((size) => (size < 0 ? 1 : size)) }));
  return [
    { name: "curl", text: curl(origin, modelId, tensors) },
    { name: "Python", text: python(origin, modelId, tensors) },
    { name: "tritonclient", text: triton(origin, modelId, tensors) },
  ];
}

const volume = (shape) => shape.reduce((product, size) => product * size, 1);
const quoted = (text) => JSON.stringify(text);

function curl(origin, modelId, tensors) {
  const url = `${origin}/v2/models/${encodeURIComponent(modelId)}/infer`;
  const isSmall = tensors.every(({ datatype, shape }) => volume(shape) <= FEW && datatype in NUMPY && datatype !== "FP16");
  if (isSmall) {
    const written = tensors.map(({ name, datatype, shape }) => ({ name, datatype, shape, data: new Array(volume(shape)).fill(EMPTY[datatype] ?? 0) }));
    const body = JSON.stringify({ inputs: written }).replaceAll("'", "\\u0027"); // within the shell's quotes
    return `curl -sS -H "Authorization: Bearer $TOKEN" ${url} -d '${body}'\n`;
  }
  if (tensors.length > 1) return "# Its inputs are too large to write out. Send them in binary, as the Python client does.\n";
  const [{ name, datatype, shape }] = tensors;
  return `# input.bin has the data of ${name} alone: ${datatype}, shape [${shape.join(", ")}], little-endian.
curl -sS -H "Authorization: Bearer $TOKEN" -H "Inference-Header-Content-Length: 0" \\
  -H "Content-Type: application/octet-stream" ${url} --data-binary @input.bin\n`;
}

const zeros = ({ datatype, shape }) => {
  const sizes = `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;
  return datatype === "BYTES" ? `np.full(${sizes}, "", np.object_)` : `np.zeros(${sizes}, np.${NUMPY[datatype] ?? "float32"})`;
};

function python(origin, modelId, tensors) {
  const inputs = tensors.map((tensor) => `${quoted(tensor.name)}: ${zeros(tensor)}`);
  return `import os

import numpy as np
from loadledger import Client

with Client(${quoted(origin)}, token=os.environ["TOKEN"]) as client:
    answer = client.infer(${quoted(modelId)}, {${inputs.join(", ")}})
for name, value in answer.items():
    print(name, value)
`;
}

function triton(origin, modelId, tensors) {
  const { host, protocol } = new URL(origin);
  const secure = protocol === "https:" ? ", ssl=True" : "";
  const lines = tensors.flatMap((tensor, at) => [
    `tensor = triton.InferInput(${quoted(tensor.name)}, [${tensor.shape.join(", ")}], ${quoted(tensor.datatype)})`,
    `tensor.set_data_from_numpy(${zeros(tensor)})`,
    `inputs.append(tensor)${at < tensors.length - 1 ? "\n" : ""}`,
  ]);
  return `import os

import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(${quoted(host)}${secure})
inputs = []
${lines.join("\n")}

headers = {"Authorization": f"Bearer {os.environ['TOKEN']}"}
answer = client.infer(${quoted(modelId)}, inputs, headers=headers)
for output in answer.get_response()["outputs"]:
    print(output["name"], answer.as_numpy(output["name"]))
`;
}
