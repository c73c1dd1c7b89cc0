"""What deploy/ holds, checked against the published schemas, against itself and against this project."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from archive_scripts.__main__ import build_parser
from handler.registry import VARIANTS
from handler.settings import Settings
from tests.haproxy import complaints

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
# The fields and types of the models in the PyPI package kserve 0.21.0, which cannot be installed beside this project's
# pins: openapi_types, by the names of attribute_map, and what must not be None.
SERVING_TYPES = json.loads(Path(__file__).with_name("kserve-0.21.json").read_text())
KUBERNETES = ("1.30", "1.37")  # the first with a sleep before a container's end, and the newest with schemas
ADDRESSES = {"MUSICGEN_TOKEN": "x", "MUSICGEN_ONE": "127.0.0.1:9", "MUSICGEN_TWO": "127.0.0.1:9"}
Resource = dict[str, Any]


def resources(path: str, variant: str = "small") -> list[Resource]:
    """The resources of a file, for another variant by the substitution that the file tells of."""
    text = re.sub(r"\bsmall\b", variant, (DEPLOY / path).read_text())
    return list(yaml.safe_load_all(text))


def of_kind(kind: str, path: str = "kubernetes/small.yaml", variant: str = "small") -> Resource:
    [found] = [resource for resource in resources(path, variant) if resource["kind"] == kind]
    return found


def pod_of(resource: Resource) -> Resource:
    """The pod that a workload makes, as a resource; of KServe's two kinds, the pod of both together."""
    spec = resource["spec"]
    if resource["kind"] == "ServingRuntime":
        predictor = of_kind("InferenceService", "kserve/small.yaml")["spec"]["predictor"]
        own = {"minReplicas", "maxReplicas", "labels", "model"}
        pod = {key: value for key, value in predictor.items() if key not in own}
        labels = predictor["labels"]
        return pod_resource({**pod, "containers": spec["containers"], "volumes": spec["volumes"]}, labels)
    return pod_resource(spec["template"]["spec"], spec["template"]["metadata"]["labels"])


def pod_resource(spec: Resource, labels: dict[str, str]) -> Resource:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": labels}, "spec": spec}


WORKLOADS = {
    "server": lambda: of_kind("Deployment"),
    "router": lambda: of_kind("Deployment", "kubernetes/common.yaml"),
    "pack": lambda: of_kind("Job", "kubernetes/pack.yaml"),
    "kserve": lambda: of_kind("ServingRuntime", "kserve/small.yaml"),
}


def containers(pod: Resource) -> list[Resource]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def container(pod: Resource, name: str) -> Resource:
    [found] = [each for each in containers(pod) if each["name"] == name]
    return found


# ---- against the schemas


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", ["kubernetes/common.yaml", "kubernetes/small.yaml", "kubernetes/pack.yaml"])
def test_every_manifest_keeps_to_the_schema_of_its_kind(path: str, version: str) -> None:
    for resource in resources(path):
        kubernetes_validate.validate(resource, version, strict=True)


def test_an_error_in_a_manifest_would_be_seen() -> None:
    deployment = of_kind("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"] = {"second": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def test_kserve_s_kinds_keep_to_its_published_types_and_their_pods_to_the_schema() -> None:
    runtime, service = resources("kserve/small.yaml")
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert not misfits(runtime, "V1alpha1ServingRuntime")
    assert not misfits(service, "V1beta1InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    [offered] = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {"name": offered["name"], "version": offered["version"]}
    assert "kserve-container" in {each["name"] for each in runtime["spec"]["containers"]}
    for version in KUBERNETES:
        kubernetes_validate.validate(pod_of(runtime), version, strict=True)


def test_an_error_in_kserve_s_kinds_would_be_seen() -> None:
    service = of_kind("InferenceService", "kserve/small.yaml")
    predictor = service["spec"]["predictor"]
    predictor.update(minReplica=1, maxReplicas="64")
    del predictor["model"]["modelFormat"]
    assert misfits(service, "V1beta1InferenceService") == [
        ".spec.predictor.maxReplicas is not int",
        ".spec.predictor.model lacks modelFormat",
        ".spec.predictor has no minReplica",
    ]


def misfits(value: Any, kind: str, place: str = "") -> list[str]:
    """What in a resource is not of the type that KServe publishes for its place; Kubernetes' own types are let by."""
    if kind in SERVING_TYPES:
        fields, required = SERVING_TYPES[kind]["fields"], SERVING_TYPES[kind]["required"]
        found = [f"{place} lacks {name}" for name in required if name not in value]
        for name, part in value.items():
            known = name in fields
            found += misfits(part, fields[name], f"{place}.{name}") if known else [f"{place} has no {name}"]
        return found
    if kind.startswith("list["):
        return [each for part in value for each in misfits(part, kind[5:-1], f"{place}[]")]
    if kind == "dict(str, str)":
        return [each for part in value.values() for each in misfits(part, "str", place)]
    plain = {"str": str, "int": int, "bool": bool}.get(kind, object)
    return [] if isinstance(value, plain) else [f"{place} is not {kind}"]


def test_the_dockerfile_keeps_to_the_linter_s_rules() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


@pytest.mark.parametrize("backends", ["machines.cfg", "kubernetes.cfg"])
def test_haproxy_takes_the_router_s_configuration(backends: str) -> None:
    assert not complaints("router.cfg", backends, **ADDRESSES)


@pytest.mark.parametrize("environment", [{}, {"MUSICGEN_TOKEN": ""}])
def test_a_gate_without_a_token_does_not_start(environment: dict[str, str]) -> None:
    assert not complaints("gate.cfg", **ADDRESSES)
    assert "set MUSICGEN_TOKEN" in complaints("gate.cfg", **environment)


# ---- against this project


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_a_container_runs_is_a_command_of_this_project(name: str) -> None:
    pod = pod_of(WORKLOADS[name]())
    for each in containers(pod):
        if each["image"].startswith("musicgen:"):
            build_parser().parse_args(each["args"])
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in each:
                    python, script = each[probe]["exec"]["command"]
                    assert (python, script) == ("python", "/app/deploy/canary.py")
        else:
            files = [Path(argument).name for argument in each["command"] if argument.endswith(".cfg")]
            assert not complaints(*files, **ADDRESSES)


def test_what_the_dockerfile_copies_is_there_and_is_let_in() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {path for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for path in line.split()[:-1]}
    assert all((ROOT / path).exists() for path in copied)
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert "*" in lines


def test_the_image_runs_as_nobody_s_user_the_one_the_pods_name() -> None:
    [user] = re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert int(user) >= 10_000
    for make in WORKLOADS.values():
        assert pod_of(make())["spec"]["securityContext"]["runAsUser"] == int(user)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_deployment_of_its_own_by_one_substitution(variant: str) -> None:
    deployment = of_kind("Deployment", variant=variant)
    pod = pod_of(deployment)
    assert f"/archives/{variant}" in container(pod, "musicgen")["args"]
    for resource in resources("kubernetes/small.yaml", variant):
        assert resource["metadata"]["name"] == f"musicgen-{variant}"
    labels = pod["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        of_kind("Service", variant=variant)["spec"]["selector"],
        of_kind("PodDisruptionBudget", variant=variant)["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector == {"app.kubernetes.io/name": "musicgen", "musicgen/variant": variant}
        assert selector.items() <= labels.items()
    target = of_kind("HorizontalPodAutoscaler", variant=variant)["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    packed = container(pod_of(of_kind("Job", "kubernetes/pack.yaml", variant)), "pack")["args"]
    assert build_parser().parse_args(packed).variant == variant


def test_the_autoscaler_s_metric_is_one_that_the_server_exports() -> None:
    [metric] = of_kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    gauges = yaml.safe_load((ROOT / "metrics.yaml").read_text())["model_metrics"]["gauge"]
    assert metric["pods"]["metric"]["name"] in {gauge["name"] for gauge in gauges}


def test_the_router_s_backends_are_the_services_and_the_ports_the_gate_s() -> None:
    backends = (DEPLOY / "haproxy" / "kubernetes.cfg").read_text()
    service = of_kind("Service")
    port = service["spec"]["ports"][0]["port"]
    assert backends.count(f"server-template pod- 64 {service['metadata']['name']}:{port} ") == 2
    gate = (DEPLOY / "haproxy" / "gate.cfg").read_text()
    ports = [each["containerPort"] for each in container(pod_of(of_kind("Deployment")), "gate")["ports"]]
    assert [int(found) for found in re.findall(r"bind .*-:(\d+)}", gate)] == ports == [port, 9082]


# ---- what an operator relies on


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_pod_may_do_nothing_it_need_not(name: str) -> None:
    pod = pod_of(WORKLOADS[name]())
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    if name != "kserve":
        assert pod["spec"]["automountServiceAccountToken"] is False
    for each in containers(pod):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in each["resources"]["limits"]
        mounts = {mount["name"]: mount for mount in each.get("volumeMounts", [])}
        writable = {mount for mount, value in mounts.items() if not value.get("readOnly")}
        assert writable <= ({"tmp", "archives"} if name == "pack" else {"tmp"})


def test_servers_ask_nothing_of_the_network() -> None:
    policies = {
        policy["metadata"]["name"]: policy["spec"]
        for policy in resources("kubernetes/common.yaml")
        if policy["kind"] == "NetworkPolicy"
    }
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    server = policies["servers"]
    assert server["podSelector"]["matchLabels"].items() <= pod_of(of_kind("Deployment"))["metadata"]["labels"].items()
    assert (server["policyTypes"], server["egress"]) == (["Ingress", "Egress"], [])
    assert [rule["ports"] for rule in server["ingress"]] == [[{"port": 9080}], [{"port": 9082}]]


@pytest.mark.parametrize("name", ["server", "kserve"])
def test_a_server_has_one_gpu_and_listens_on_loopback_behind_its_gate(name: str) -> None:
    pod = pod_of(WORKLOADS[name]())
    server = container(pod, "kserve-container" if name == "kserve" else "musicgen")
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert build_parser().parse_args(server["args"]).open  # which is refused where an address is not loopback
    gate = container(pod, "gate")
    [token] = gate["env"]
    assert token["name"] == "MUSICGEN_TOKEN"
    assert "secretKeyRef" in token["valueFrom"]
    assert not any("nvidia.com/gpu" in each["resources"]["limits"] for each in containers(pod) if each is not server)


@pytest.mark.parametrize("name", ["server", "kserve"])
def test_a_pod_that_ends_has_the_time_to_finish_what_it_took(name: str) -> None:
    pod = pod_of(WORKLOADS[name]())
    server = container(pod, "kserve-container" if name == "kserve" else "musicgen")
    drain = build_parser().parse_args(server["args"]).drain
    assert drain >= Settings().timeout  # nothing lasts longer
    sleep = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= sleep + drain + 30
    if name == "server":  # its gate starts before it and stops after it
        assert container(pod, "gate")["restartPolicy"] == "Always"
    assert of_kind("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


# ---- the canary


@pytest.fixture(scope="module")
def canary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("canary", DEPLOY / "canary.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeServer:
    """Answers what the canary asks; `finishing` clips are made between two looks at the metrics."""

    def __init__(
        self, answer: bytes | tuple[int, str], finishing: int = 0, models: tuple[str, ...] = ("small",)
    ) -> None:
        self.answer, self.finishing, self.models, self.finished = answer, finishing, models, 0

    def fetch(self, what: str | urllib.request.Request, seconds: float = 10) -> bytes:
        if isinstance(what, str) and what.endswith("/models?limit=1000"):
            return json.dumps({"models": [{"modelName": name} for name in self.models]}).encode()
        if isinstance(what, str):
            self.finished += self.finishing
            return "".join(
                f'musicgen_{metric}_total{{ModelName="{name}",Worker="7",Hostname="x",}} {count}\n'
                for name, metric, count in (
                    ("small", "audio_seconds", 0.1 * self.finished),
                    ("small", "requests", 5 * self.finished),
                    ("other", "audio_seconds", 5),
                )
            ).encode()
        if isinstance(self.answer, bytes):
            return self.answer
        status, kind = self.answer
        body = json.dumps({"error": {"code": status, "type": kind}}).encode()
        raise urllib.error.HTTPError(what.full_url, status, kind, Message(), io.BytesIO(body))


@pytest.mark.parametrize(
    ("server", "code", "says"),
    [
        (FakeServer(b"RIFF...."), 0, "every model makes music"),
        (FakeServer(b"<html>"), 1, "small: the reply is no audio"),
        (FakeServer((503, "busy"), finishing=1), 0, "every model makes music"),
        (FakeServer((503, "busy")), 1, "busy"),
        (FakeServer((504, "deadline_exceeded"), finishing=1), 0, "every model makes music"),
        (FakeServer((503, "unavailable"), finishing=1), 1, "unavailable"),
        (FakeServer((500, "internal_error"), finishing=1), 1, "internal_error"),
        (FakeServer(b"RIFF....", models=()), 1, "the server has no models"),
    ],
)
def test_the_canary_tells_whether_music_is_made(
    canary: ModuleType,
    server: FakeServer,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(canary, "fetch", server.fetch)
    monkeypatch.setattr(canary, "PAUSE", 0.01)
    monkeypatch.setattr(sys, "argv", ["canary.py", "--seconds", "0.1"])
    assert canary.main() == code
    assert says in capsys.readouterr().out


def test_the_canary_tells_of_a_server_that_is_not_there(
    canary: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["canary.py", "--port", "1"])
    assert canary.main() == 1
    assert "the server does not answer" in capsys.readouterr().out
