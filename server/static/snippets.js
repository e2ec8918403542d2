// Programs that call a model: with curl, with the project's own client, and with Triton's.

import { byteSize, zeroTensors } from "./tensors.js";

const NUMPY = {
  BOOL: "bool_", INT8: "int8", UINT8: "uint8", INT16: "int16", UINT16: "uint16", INT32: "int32", UINT32: "uint32", INT64: "int64",
  UINT64: "uint64", FP16: "float16", FP32: "float32", FP64: "float64", BYTES: "object_",
};

// `inputs` are those of the metadata; -1 in a shape becomes 1. Returns [{name, text}], each complete.
export function snippets(origin, modelId, inputs) {
  const tensors = zeroTensors(inputs);
  return [
    { name: "curl", text: curl(origin, modelId, tensors) },
    { name: "Python", text: python(origin, modelId, tensors) },
    { name: "tritonclient", text: triton(origin, modelId, tensors) },
  ];
}

const quoted = (text) => JSON.stringify(text);
const inShellQuotes = (json) => `'${JSON.stringify(json).replaceAll("'", "\\u0027")}'`;

// The command that `loadledger run` prints: a long request is zeros in binary.
function curl(origin, modelId, tensors) {
  const command = `curl -sS -H "Authorization: Bearer $TOKEN" ${origin}/v2/models/${encodeURIComponent(modelId)}/infer`;
  if (tensors.every(({ data }) => Array.isArray(data))) return `${command} -d ${inShellQuotes({ inputs: tensors })}\n`;
  const inputs = tensors.map(({ data: _, ...tensor }) => ({ ...tensor, parameters: { binary_data_size: byteSize(tensor) } }));
  const head = inShellQuotes({ inputs }), length = new TextEncoder().encode(head).length - 2;
  return `(printf %s ${head}; head -c ${tensors.reduce((sum, tensor) => sum + byteSize(tensor), 0)} /dev/zero) |
${command} \\
  -H "Content-Type: application/octet-stream" -H "Inference-Header-Content-Length: ${length}" --data-binary @-\n`;
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
