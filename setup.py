"""The distribution `loadledger`: its import packages, one command, and the files that ship with them."""

from pathlib import Path

from setuptools import find_packages, setup

OTEL = ["opentelemetry-exporter-otlp-proto-http>=1.35", "opentelemetry-sdk>=1.35"]
OPENVINO = ["onnxruntime-ep-openvino>=1.8.1; platform_machine == 'x86_64'"]  # it is not made for others
CUDA = ["nvidia-ml-py>=12.560.30"]  # ONNX Runtime's wheel for it is installed in place of onnxruntime
EXTENSIONS = ["onnxruntime-extensions>=0.15; python_version < '3.14'"]  # it is not made for more
IMAGES = ["Pillow>=11"]
CLOUD = ["obstore~=0.12.1"]
HUGGINGFACE = ["huggingface_hub>=2.4.0,<3"]
POSTGRES = ["asyncpg>=0.30,<1"]
GRPC = ["grpcio>=1.81.1,<2", "protobuf>=6.33.5"]
EXAMPLES = [  # 65 MB, of it scipy 34
    *IMAGES,
    "ipykernel>=7",
    "lightgbm>=4.6",
    "nbclient>=0.10.2",
    "onnx>=1.23",
    "onnxmltools>=1.16",
    "scikit-learn>=1.7",
    "skl2onnx>=1.20",
    "xgboost-cpu>=3.1",
]
TEST = [
    *IMAGES,
    *OTEL,
    *EXTENSIONS,
    *CLOUD,
    *HUGGINGFACE,
    *POSTGRES,
    *OPENVINO,
    *CUDA,
    *GRPC,
    "asyncpg-stubs>=0.30",
    "axe-playwright-python>=0.1.4",
    "duckdb>=1.1",  # with pandas: records are read without our code
    "flask>=3",
    "flask-cors>=5",
    "grpcio-health-checking>=1.81",
    "grpcio-tools>=1.81",  # for `make generated`
    "hypothesis>=6.150",
    "kubernetes-validate>=1.37",  # with the schemas of 1.25 to 1.37; 108 MB
    "kserve>=0.21; python_version < '3.14'",  # it is not made for more
    "moto[s3]>=5.2",  # a server like S3; its extra `server` brings all of AWS, and minutes of pip
    "mypy==2.4.*",
    "onnx>=1.23",
    "openapi-python-client>=0.29",
    "openapi-spec-validator>=0.7",
    "pandas>=2.2",
    "playwright>=1.65",
    "pytest>=9",
    "pytest-aiohttp>=1.1",
    "pytest-xdist>=3.8",
    "ruff==0.17.*",
    "setuptools>=77",  # the packaging test builds the wheel without a network
    "tritonclient[grpc,http]>=2.73",
    "types-PyYAML",
    "types-grpcio",
    "types-protobuf==6.*",  # as the newest protobuf that kserve allows
    "types-tqdm",
]
DOCS = ["furo>=2025.12.19", "myst-parser==5.*", "sphinx==9.*"]  # furo is named by dates
PACKAGES = ["answers", "events", "features", "loadledger", "migrations", "nodes", "runtime", "server"]

setup(
    name="loadledger",
    version="0.1.0",
    description="Loads and unloads ONNX models over HTTP, a process for each, with a ledger of who did what.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0 AND MIT",  # MIT: the console's libraries
    license_files=["LICENSE", "server/static/vendor/LICENSE-*.txt"],
    python_requires=">=3.11",
    packages=[*find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]), "server.examples"],
    package_dir={"server.examples": "examples"},
    package_data={
        "answers": ["py.typed"],
        "events": ["py.typed"],
        "features": ["py.typed", "grpc/*.pb", "grpc/*.proto"],
        "loadledger": ["py.typed", "*.pyi", "cli/examples.txt"],
        "migrations": ["*.sql", "postgres/*.sql"],
        "nodes": ["py.typed"],
        "runtime": ["py.typed"],
        "server": ["py.typed", "openapi/*.json", "static/*", "static/vendor/*"],
        "server.examples": ["digits/*/model.onnx", "digits.json"],
    },
    install_requires=[
        "PyJWT[crypto]>=2.10",
        "cryptography>=45",  # x509.verification with policies for extensions
        "PyYAML>=6",
        "aiohttp>=3.14.1,<4",  # 3.14.0 keeps any number of pipelined requests of a connection in memory
        "aiohttp-apispec==3.0.0b2",  # the only release that works with marshmallow 4 and Python >= 3.12
        "aiosqlite>=0.22.1",
        "apispec>=6.9,<7",
        "click>=8.4.2",  # as huggingface_hub
        "marshmallow>=4,<5",
        "msgspec>=0.21",
        "multidict>=6.0.3",
        "numpy>=2.2",
        "onnxruntime>=1.32",
        "prometheus-client>=0.23",
        "rich>=14",
        "uvloop>=0.22.1",
    ],
    extras_require={
        "docs": DOCS,  # for `make docs` alone
        "test": TEST,
        "images": IMAGES,  # for `loadledger infer` with pictures
        "hostile": ["schemathesis>=4.32"],  # beside "test", for `make hostile` alone
        "extensions": EXTENSIONS,
        "openvino": OPENVINO,  # for loads on Intel's processors, GPUs and NPUs
        "cuda": CUDA,  # for the memory of NVIDIA's GPUs; beside onnxruntime-gpu
        "grpc": GRPC,  # for --grpc-port
        "otel": OTEL,
        "cloud": CLOUD,  # for `add s3://...`, gs:// and az://
        "huggingface": HUGGINGFACE,  # for `add hf://...`
        "postgres": POSTGRES,  # for a ledger in PostgreSQL
        "examples": EXAMPLES,  # to train examples/ again, and for the pages and notebooks that export models
    },
    entry_points={"console_scripts": ["loadledger=loadledger.cli.main:main"]},
)
