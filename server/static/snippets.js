// Programs that call a model: with curl, with the project's own client, and with Triton's.

import { bytes, oneLine } from "./format.js";
import { byteSize, elementBytes, exampleTensors, MOST, WITHOUT_JSON } from "./tensors.js";

// What somebody replaces by a token, once in each program.
export const PLACEHOLDER = "PASTE A TOKEN HERE";

const numpy = (datatype) => ({ BOOL: "bool_", BF16: "float32" })[datatype] ?? datatype.toLowerCase().replace("fp", "float");

// `inputs` and `outputs` are those of the metadata. Returns [{name, text}], each complete but for the token; of a model that
// was not loaded, whose inputs are larger than a request, the text is a reason.
export function snippets(origin, modelId, inputs, outputs) {
  const tensors = exampleTensors(inputs), large = tensors.find((tensor) => byteSize(tensor) > MOST);
  if (large && inputs.every(({ example }) => !example)) {
    const text = `# ${oneLine(large.name, 60)} has ${bytes(byteSize(large))}; a server takes ${bytes(MOST)}, or its --max-request-size\n`;
    return ["curl", "Python", "tritonclient"].map((name) => ({ name, text }));
  }
  return [
    { name: "curl", text: curl(origin, modelId, tensors, outputs) },
    { name: "Python", text: python(origin, modelId, tensors) },
    { name: "tritonclient", text: triton(origin, modelId, tensors) },
  ];
}

const quoted = (text) => JSON.stringify(text);
const inShellQuotes = (json) => `'${JSON.stringify(json).replaceAll("'", "\\u0027")}'`;

// A long input is zeros or ones in binary. An answer that JSON cannot represent goes to a file.
function curl(origin, modelId, tensors, outputs) {
  const isBinary = outputs.some(({ datatype }) => WITHOUT_JSON.includes(datatype));
  const rest = isBinary ? { parameters: { binary_data_output: true } } : {}, file = isBinary ? " --fail-with-body --output answer.bin" : "";
  const command = `curl -sS${file} ${origin}/v2/models/${encodeURIComponent(modelId)}/infer -H "Authorization: Bearer $TOKEN"`;
  const token = `TOKEN="${PLACEHOLDER}"\n`, long = tensors.filter(({ data }) => !Array.isArray(data));
  if (!long.length) return `${token}${command} \\\n  -d ${inShellQuotes({ inputs: tensors, ...rest })}\n`;
  const inputs = tensors.map(({ data, ...tensor }) =>
    (Array.isArray(data) ? { ...tensor, data } : { ...tensor, parameters: { binary_data_size: byteSize(tensor) } }));
  const head = inShellQuotes({ inputs, ...rest }), length = new TextEncoder().encode(head).length - 2;
  return `${token}(printf %s ${head}; ${long.map(binary).join("; ")}) |
${command} \\
  -H "Content-Type: application/octet-stream" -H "Inference-Header-Content-Length: ${length}" --data-binary @-\n`;
}

// The command that prints a tensor: `yes` repeats as many letters as an element has bytes, the last of them a new line.
function binary(tensor) {
  const element = elementBytes(tensor.datatype, tensor.data), letters = "abcdefg".slice(0, element.length - 1);
  if (!element.some(Boolean)) return `head -c ${byteSize(tensor)} /dev/zero`;
  const octal = element.map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");
  return `yes '${letters}' | head -c ${byteSize(tensor)} | LC_ALL=C tr '${letters}\\n' '${octal}'`;
}

function array({ datatype, shape, data }) {
  const sizes = `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`, fill = Array.isArray(data) ? (data[0] ? "ones" : "zeros") : data;
  return datatype === "BYTES" ? `np.full(${sizes}, "", np.object_)` : `np.${fill}(${sizes}, np.${numpy(datatype)})`;
}

function python(origin, modelId, tensors) {
  const inputs = tensors.map((tensor) => `${quoted(tensor.name)}: ${array(tensor)}`);
  return `import numpy as np
from loadledger import Client

with Client(${quoted(origin)}, token="${PLACEHOLDER}") as client:
    answer = client.infer(${quoted(modelId)}, {${inputs.join(", ")}})
for name, value in answer.items():
    print(name, value)
`;
}

function triton(origin, modelId, tensors) {
  const { host, protocol } = new URL(origin);
  const secure = protocol === "https:" ? ", ssl=True" : "";
  const parts = tensors.map((tensor) => `tensor = triton.InferInput(${quoted(tensor.name)}, [${tensor.shape.join(", ")}], ${quoted(tensor.datatype)})
tensor.set_data_from_numpy(${array(tensor)})
inputs.append(tensor)\n`);
  return `import numpy as np
import tritonclient.http as triton

headers = {"Authorization": "Bearer ${PLACEHOLDER}"}
client = triton.InferenceServerClient(${quoted(host)}${secure})
inputs = []
${parts.join("\n")}
answer = client.infer(${quoted(modelId)}, inputs, headers=headers)
for output in answer.get_response()["outputs"]:
    print(output["name"], answer.as_numpy(output["name"]))
`;
}
