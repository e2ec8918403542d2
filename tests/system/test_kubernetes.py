"""`deploy/kubernetes/`: objects match the published schemas, each other, the image and the server.

kubernetes-validate has the schemas of Kubernetes' own kinds. The `ScaledObject` of KEDA is held against the
fields of KEDA's documentation, and the HorizontalPodAutoscaler that KEDA makes of it against Kubernetes'
schema.
"""

import asyncio
import json
import re
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import kubernetes_validate
import pytest
import yaml
from openapi_schema_validator import OAS30Validator
from support.clients import run_command
from support.deployment import (
    DEPLOY,
    DRAIN_S,
    LEDGER_URL,
    ROOT,
    drain_options,
    image_environment,
    instructions,
    read_valid,
)
from support.http import LocalApi
from support.models import add
from support.origins import Asked, RangedFile, Reply, answer, serving_site, write_authority
from support.pages import FAMILIES

from server.app import all_routes
from server.auth import keys
from server.auth.access import Access
from server.auth.keys import KeyRing

FOLDER = DEPLOY / "kubernetes"
KEDA = "keda.yaml"
FILES = [path.name for path in sorted(FOLDER.iterdir()) if path.name != KEDA]
SERVERS = ("single.yaml", "cluster.yaml")
PAGE = ROOT / "docs" / "cluster.md"
OLDEST = "1.28"
"""The first release in which a probe's terminationGracePeriodSeconds is stable."""
LATEST = kubernetes_validate.latest_version()

Json = dict[str, Any]


def exact(required: str, **properties: Json) -> Json:
    """Return the schema of an object with these members and no others; `required` names some of them."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
PROMETHEUS_FIELDS = (
    "serverAddress query queryParameters threshold activationThreshold namespace customHeaders "
    "ignoreNullValues unsafeSsl authModes"
)
SCALED_OBJECT = exact(
    "scaleTargetRef triggers",
    scaleTargetRef=exact("name", apiVersion=TEXT, kind=TEXT, name=TEXT, envSourceContainerName=TEXT),
    pollingInterval=COUNT,
    cooldownPeriod=COUNT,
    initialCooldownPeriod=COUNT,
    idleReplicaCount=COUNT,
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    fallback=exact("failureThreshold replicas", failureThreshold=COUNT, replicas=COUNT),
    advanced=exact(
        "",
        restoreToOriginalReplicaCount={"type": "boolean"},
        horizontalPodAutoscalerConfig=exact("", name=TEXT, behavior={"type": "object"}),
    ),
    triggers={
        "type": "array",
        "minItems": 1,
        "items": exact(
            "type metadata",
            type={"enum": ["prometheus"]},
            name=TEXT,
            useCachedMetrics={"type": "boolean"},
            metricType={"enum": ["AverageValue", "Value"]},
            authenticationRef=exact("name", name=TEXT, kind=TEXT),
            metadata=exact(
                "serverAddress query threshold",
                **dict.fromkeys(PROMETHEUS_FIELDS.split(), TEXT),
            ),
        ),
    },
)
"""The `spec` of a ScaledObject (keda.sh/v1alpha1) with a Prometheus trigger, by KEDA's documentation."""


def objects(file: str, kind: str | None = None) -> list[Json]:
    found = yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8"))
    return [entry for entry in found if kind in (None, entry["kind"])]


def one(file: str, kind: str) -> Json:
    [found] = objects(file, kind)
    return found


def template(file: str) -> Json:
    """Return the only pod template of a file."""
    [found] = [entry["spec"]["template"] for entry in objects(file) if "template" in entry.get("spec", {})]
    assert isinstance(found, dict)
    return found


def pod(file: str) -> Json:
    found: Json = template(file)["spec"]
    return found


def container(file: str) -> Json:
    [found] = pod(file)["containers"]
    assert isinstance(found, dict)
    return found


def mounts(file: str) -> dict[str, Json]:
    return {mount["mountPath"]: mount for mount in container(file)["volumeMounts"]}


def secrets(file: str) -> set[str]:
    """Return the names of the Secrets that a pod reads, as variables or files."""
    read = {entry["secretRef"]["name"] for entry in container(file).get("envFrom", [])}
    return read | {volume["secret"]["secretName"] for volume in pod(file)["volumes"] if "secret" in volume}


def variables(name: str) -> dict[str, str]:
    """Return the variables of a node's container in the pod of this name, without those of Secrets."""
    found = dict[str, str]()
    for entry in container("cluster.yaml")["env"]:
        if "value" in entry:
            text = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], entry["value"])
        else:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            text = name
        found[entry["name"]] = text
    return found


def hook() -> list[str]:
    command: list[str] = container("cluster.yaml")["lifecycle"]["preStop"]["exec"]["command"]
    return command


# All files


@pytest.mark.parametrize("version", [OLDEST, LATEST])
@pytest.mark.parametrize("file", FILES)
def test_objects_match_the_published_schemas(file: str, version: str) -> None:
    for entry in objects(file):
        assert kubernetes_validate.validate(entry, version, strict=True) == ".".join(version.split(".")[:2])


@pytest.mark.parametrize("file", FILES)
def test_pod_has_least_privilege(file: str) -> None:
    spec, inner = pod(file), container(file)["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == instructions("USER")[-1]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    asked = container(file)["resources"]
    assert asked["requests"]["memory"] == asked["limits"]["memory"]
    templates = [entry["spec"].get("volumeClaimTemplates", []) for entry in objects(file) if "spec" in entry]
    claimed = {claim["metadata"]["name"] for claims in templates for claim in claims}
    volumes = {volume["name"] for volume in spec["volumes"]} | claimed
    assert {mount["name"] for mount in mounts(file).values()} == volumes
    if file in SERVERS:
        assert {"/tmp", *json.loads(instructions("VOLUME")[0])} <= mounts(file).keys()
        writable = {path for path, mount in mounts(file).items() if not mount.get("readOnly")}
        assert writable == {"/tmp", image_environment()["LOADLEDGER_DATA"]}


@pytest.mark.parametrize("file", SERVERS)
def test_probes_ask_public_routes_on_the_service_port(file: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(file)["ports"]}
    assert ports == {"http": int(image_environment()["LOADLEDGER_PORT"])}
    asked = {
        name: container(file)[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert {probe["port"] for probe in asked.values()} == {"http"}
    public = {route.path for route in all_routes() if route.access is Access.PUBLIC and route.method == "GET"}
    assert {probe["path"] for probe in asked.values()} <= public
    # Nodes answer inferences while the log cannot be written.
    ready = {"single.yaml": "/health/ready", "cluster.yaml": "/health/live"}[file]
    assert asked["readiness"]["path"] == ready
    assert asked["liveness"]["path"] == "/health/live"
    for service in objects(file, "Service"):
        [port] = service["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (ports["http"], "http")


@pytest.mark.parametrize("file", SERVERS)
def test_labels_claims_and_configuration_match(file: str, tmp_path: Path) -> None:
    labels = template(file)["metadata"]["labels"]
    [owner] = [entry for entry in objects(file) if "template" in entry.get("spec", {})]
    assert owner["spec"]["selector"]["matchLabels"] == labels
    assert all(service["spec"]["selector"] == labels for service in objects(file, "Service"))
    claims = {claim["metadata"]["name"] for claim in objects(file, "PersistentVolumeClaim")}
    volumes = [volume for volume in pod(file)["volumes"] if "persistentVolumeClaim" in volume]
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in volumes} == claims
    [(name, text)] = one(file, "ConfigMap")["data"].items()
    (tmp_path / name).write_text(text)
    given = {entry["name"]: entry["value"] for entry in container(file)["env"] if "value" in entry}
    path = Path(given["LOADLEDGER_CONFIG"])
    assert (path.name, str(path.parent) in mounts(file)) == (name, True)
    config = read_valid({"config": tmp_path / name}, image_environment())
    assert (config.data, config.log_format) == (Path("/data"), "json")


# One server


def test_single_server_is_replaced_before_another_starts() -> None:
    deployment = one("single.yaml", "Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert pod("single.yaml")["terminationGracePeriodSeconds"] > 2 * DRAIN_S


# Nodes


def test_node_settings_are_valid_and_its_address_is_its_pod() -> None:
    given = variables("loadledger-2")
    config_path = given.pop("LOADLEDGER_CONFIG")
    assert config_path
    read_valid({}, image_environment() | given | {"LOADLEDGER_LEDGER": LEDGER_URL})
    [headless] = [
        each for each in objects("cluster.yaml", "Service") if each["spec"].get("clusterIP") == "None"
    ]
    assert headless["spec"]["publishNotReadyAddresses"] is True
    service = one("cluster.yaml", "StatefulSet")["spec"]["serviceName"]
    assert service == headless["metadata"]["name"]
    assert given["LOADLEDGER_NODE_ADDRESS"] == f"http://{given['LOADLEDGER_NODE_NAME']}.{service}:8080"


def test_cluster_keeps_a_volume_for_each_node_and_one_of_models() -> None:
    cluster = one("cluster.yaml", "StatefulSet")["spec"]
    [claim] = cluster["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == mounts("cluster.yaml")[image_environment()["LOADLEDGER_DATA"]]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    models = one("cluster.yaml", "PersistentVolumeClaim")
    assert models["spec"]["accessModes"] == ["ReadWriteMany"]
    budget = one("cluster.yaml", "PodDisruptionBudget")["spec"]
    assert (cluster["replicas"], budget["maxUnavailable"]) == (3, 1)
    assert budget["selector"] == cluster["selector"]


def test_pod_drains_its_node_within_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (image_environment() | variables("loadledger-2")).items():
        monkeypatch.setenv(name, value)
    asked = drain_options(hook())
    assert (asked["node_id"], asked["wait"]) == ("loadledger-2", True)
    assert asked["data"] == Path(
        image_environment()["LOADLEDGER_DATA"]
    )  # through its socket, without a token
    node = pod("cluster.yaml")["terminationGracePeriodSeconds"]
    assert asked["timeout_s"] + 2 * DRAIN_S < node
    # A server that does not answer gets no time for a drain.
    assert 2 * DRAIN_S < container("cluster.yaml")["livenessProbe"]["terminationGracePeriodSeconds"] < node


def test_schema_is_migrated_by_its_owner_alone() -> None:
    job = one("migrate.yaml", "Job")
    assert "name" not in job["metadata"]  # each run is a Job of its own
    assert container("migrate.yaml")["args"] == ["migrate", "--ledger", "$(LOADLEDGER_LEDGER)"]
    assert container("migrate.yaml")["image"] == container("cluster.yaml")["image"]
    assert secrets("migrate.yaml").isdisjoint(secrets("cluster.yaml"))
    selector = one("cluster.yaml", "StatefulSet")["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= template("migrate.yaml")["metadata"]["labels"].items()


# Further nodes while inferences wait


def autoscaler(scaled: Json) -> Json:
    """Return the HorizontalPodAutoscaler that KEDA makes of a ScaledObject."""
    spec, name = scaled["spec"], scaled["metadata"]["name"]
    [trigger] = spec["triggers"]
    metric = {
        "metric": {
            "name": "s0-prometheus",
            "selector": {"matchLabels": {"scaledobject.keda.sh/name": name}},
        },
        "target": {"type": "AverageValue", "averageValue": trigger["metadata"]["threshold"]},
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"keda-hpa-{name}", "labels": scaled["metadata"]["labels"]},
        "spec": {
            "scaleTargetRef": spec["scaleTargetRef"],
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            "metrics": [{"type": "External", "external": metric}],
        },
    }


@pytest.mark.parametrize("version", [OLDEST, LATEST])
def test_scaled_object_matches_keda_and_its_autoscaler_kubernetes(version: str) -> None:
    scaled = one(KEDA, "ScaledObject")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    OAS30Validator(SCALED_OBJECT).validate(scaled["spec"])
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate(scaled, version, strict=True)
    assert kubernetes_validate.validate(autoscaler(scaled), version, strict=True)


def test_scaled_object_is_of_the_nodes_and_counts_their_inferences() -> None:
    [scaled] = objects(KEDA)
    spec, cluster = scaled["spec"], one("cluster.yaml", "StatefulSet")
    target = {"apiVersion": cluster["apiVersion"], "kind": "StatefulSet", "name": cluster["metadata"]["name"]}
    assert spec["scaleTargetRef"] == target
    assert spec["minReplicaCount"] == cluster["spec"]["replicas"] < spec["maxReplicaCount"]
    [trigger] = spec["triggers"]
    [metric] = re.findall(r"loadledger_\w+", trigger["metadata"]["query"])
    assert metric in {family.name for family in FAMILIES}
    # One node at a time: the one that leaves drains first.
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    drain_s = pod("cluster.yaml")["terminationGracePeriodSeconds"]
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": drain_s}]


# A version from inside the cluster


def test_add_job_is_at_the_service_and_not_behind_it() -> None:
    given = {entry["name"]: entry for entry in container("add.yaml")["env"]}
    assert given["LOADLEDGER_TOKEN"].keys() == {"name", "valueFrom"}
    labels = template("add.yaml")["metadata"]["labels"]
    for file in SERVERS:
        services = objects(file, "Service")
        addresses = {
            f"http://{each['metadata']['name']}:{each['spec']['ports'][0]['port']}"
            for each in services
            if each["spec"].get("clusterIP") != "None"
        }
        assert addresses == {given["LOADLEDGER_URL"]["value"]}
        assert not any(each["spec"]["selector"].items() <= labels.items() for each in services)
        assert not objects(file, "NetworkPolicy")  # else it has to admit the Job
        assert container("add.yaml")["image"] == container(file)["image"]
        assert secrets("add.yaml").isdisjoint(secrets(file))


def test_add_job_is_repeated_with_its_cache() -> None:
    job = one("add.yaml", "Job")
    assert "name" not in job["metadata"]  # each run is a Job of its own
    assert pod("add.yaml")["restartPolicy"] == "OnFailure"
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    cache = mounts("add.yaml")[job_variables()["XDG_CACHE_HOME"]]["name"]
    [volume] = [volume for volume in pod("add.yaml")["volumes"] if volume["name"] == cache]
    assert set(volume["emptyDir"]) == {"sizeLimit"}  # on the disk
    [optional] = container("add.yaml")["envFrom"]
    assert optional["secretRef"]["optional"] is True


async def test_add_job_goes_on_with_its_download(api: LocalApi, tmp_path: Path) -> None:
    file = RangedFile(add(1).SerializeToString(), cuts=[10])
    replies: list[Reply] = [file, lambda _: answer(404), file]
    cache = tmp_path / "cache"

    def reply(asked: Asked) -> bytes:
        return replies.pop(0)(asked)

    async with serving_site(reply) as site:
        given = job_variables() | {
            "LOADLEDGER_URL": api.url,
            "LOADLEDGER_TOKEN": api.token("admin"),
            "HOME": str(cache),
            "XDG_CACHE_HOME": str(cache),
        }
        assert given.keys() == job_variables().keys()
        variables: dict[str, Any] = {**given, "SSL_CERT_FILE": write_authority(tmp_path)}
        arguments = [site.url() if "://" in each else each for each in container("add.yaml")["args"]]
        arguments += ["--digest", f"sha256:{sha256(file.content).hexdigest()}"]
        ended = [await asyncio.to_thread(run_command, *arguments, **variables) for _ in range(2)]
    assert [each.exit_code == 0 for each in ended] == [False, True]
    assert (await api.model(arguments[1]))["versions"] == [1]
    assert [asked.headers.get("range") for asked in site.asked] == [None, "bytes=10-", "bytes=10-"]
    assert list((cache / "loadledger").iterdir()) == []


def job_variables() -> dict[str, str]:
    """Return the variables of the Job that adds a version; "" for those from Secrets."""
    return {entry["name"]: entry.get("value", "") for entry in container("add.yaml")["env"]}


def test_page_creates_each_secret_before_it_is_used() -> None:
    text = PAGE.read_text(encoding="utf-8")
    created = re.findall(r"create secret generic (?:-n \S+ )?([\w-]+)", text)
    assert set(created) == secrets("cluster.yaml") | secrets("migrate.yaml")
    steps = [f"secret generic -n models {created[-1]}", "migrate.yaml", "wait", "cluster.yaml", "token"]
    _, _, commands = text.partition("kubectl create secret")
    places = [commands.index(step) for step in steps]
    assert all(earlier < later for earlier, later in pairwise(places))


def test_mounted_keys_sign_and_verify_at_every_node(tmp_path: Path) -> None:
    keys.create_key(tmp_path / "new")
    nodes = [tmp_path / "loadledger-0", tmp_path / "loadledger-1"]
    for data in nodes:
        mount_secret(tmp_path / "new" / "keys", data / "keys")
        keys.ensure_data_dir(data)
    first, second = nodes
    token = keys.sign_token(first, "alice", ["admin"], expires_s=60, audience="loadledger")
    kid = jwt.get_unverified_header(token)["kid"]
    verifying = KeyRing(second).find(kid, now=0.0)
    assert verifying is not None
    claims = jwt.decode(token, verifying.public, [verifying.algorithm], audience="loadledger")
    assert claims["sub"] == "alice"
    assert keys.open_signer(first).public_key != keys.open_signer(second).public_key


def mount_secret(files: Path, folder: Path) -> None:
    """Lay files out as Kubernetes mounts a Secret: each is a link through `..data`, readable by the group."""
    content = folder / "..2026_01_31_14_02_00.1"
    content.mkdir(parents=True)
    (folder / "..data").symlink_to(content.name)
    for path in files.iterdir():
        (content / path.name).write_bytes(path.read_bytes())
        (content / path.name).chmod(0o440)
        (folder / path.name).symlink_to(Path("..data") / path.name)
    folder.chmod(0o555)
