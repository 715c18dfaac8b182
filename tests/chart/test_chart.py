"""What the Kubernetes chart promises, of the objects that Helm makes of it."""

from __future__ import annotations

import copy
import math
import re
import shlex
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart.chart import CHART, NAMESPACE, NEWEST, OLDEST, ROOT, Object, container, one, pod, render, validate
from image.dockerfile import read
from typer.testing import CliRunner

from quire.engine.config import EngineConfig
from quire.server import cli, cli_serve
from quire.server.auth import POLICIES
from quire.server.config import ServerConfig
from quire.server.keys_file import load_keys
from quire.server.serve import CLOSE_SECONDS

KEYS = {"auth": {"keys": ["a-key"]}}
NAMED = {"auth": {"namedKeys": [{"name": "alice", "sha256": "0" * 64, "rpm": 60, "scopes": ["infer", "metrics"]}]}}
OPEN = {"auth": {"insecureNoAuth": True}}
SECRET = {"auth": {"existingSecret": "mine", "existingSecretEntry": "keys.yaml"}}
# One after another, everything that can be chosen.
CHOICES: dict[str, Object] = {
    "least": KEYS,
    "named keys": NAMED,
    "no keys": OPEN,
    "a secret that is there": SECRET,
    "gpus": {**KEYS, "gpus": 2, "shm": "2Gi", "options": {"max-model-len": 1048576, "kv-cache-dtype": "fp8"}},
    "a hub id": {**KEYS, "model": "Qwen/Qwen3-0.6B", "huggingface": {"existingSecret": "hub"}},
    "one claim": {**KEYS, "cache": {"persistence": True, "storageClass": "fast"}},
    "a claim for several": {**KEYS, "replicas": 3, "cache": {"persistence": True, "accessMode": "ReadWriteMany"}},
    "a claim that is there": {**KEYS, "cache": {"persistence": True, "existingClaim": "weights"}},
    "hpa": {**KEYS, "autoscaling": {"hpa": {"enabled": True}, "minReplicas": 2}},
    "keda": {**KEYS, "autoscaling": {"keda": {"enabled": True}, "minReplicas": 0}},
    "monitor": {**NAMED, "serviceMonitor": {"enabled": True, "bearerTokenSecret": {"name": "s", "key": "k"}}},
    "pool": {**KEYS, "inferencePool": {"enabled": True, "endpointPicker": "picker"}},
    "bare": {**KEYS, "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "extras": {
        **KEYS,
        "image": {"digest": "sha256:" + "a" * 64, "pullSecrets": ["hub"]},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "extraVolumes": [{"name": "models", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models"}],
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 4318}]}]},
        "service": {"port": 9000, "healthPort": 9001, "type": "LoadBalancer"},
        "podLabels": {"team": "a"},
        "podAnnotations": {"note": "b"},
    },
}


@pytest.fixture(params=CHOICES.values(), ids=CHOICES.keys())
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`settings(objects)`: what quire serve makes of the command, the files and the environment that a pod gives it."""
    started: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr(cli_serve, "run", lambda engine, server: started.append((engine, server)) or True)
    image = read(ROOT / "Dockerfile").config("cpu")

    def serve(objects: list[Object]) -> tuple[EngineConfig, ServerConfig]:
        options = yaml.safe_load(one(objects, "ConfigMap")["data"]["serve.yaml"])
        for name in ("api-key-file", "api-keys-file"):
            if name in options:
                entry = Path(options[name]).name
                text = one(objects, "Secret")["stringData"][entry]
                options[name] = str(tmp_path / entry)
                (tmp_path / entry).write_text(text)
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(options))
        args = [
            part.replace("/etc/quire/serve.yaml", str(tmp_path / "serve.yaml")) for part in container(objects)["args"]
        ]
        done = CliRunner().invoke(cli.app, args, env={**image.env, "PATH": "/usr/bin"})
        assert done.exit_code == 0, done.output
        return started.pop()

    return serve


# what Kubernetes says


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_are_what_kubernetes_knows(objects: list[Object], version: str) -> None:
    for item in objects:
        validate(item, version)


def test_the_judges_see_mistakes() -> None:
    """One for each kind of judge: an unknown field, a wrong type, an unknown word."""
    objects = render({**KEYS, **CHOICES["keda"], "serviceMonitor": {"enabled": True}})
    objects += render(CHOICES["pool"])
    spoiled = {
        "Deployment": lambda item: item["spec"]["template"]["spec"]["containers"][0]["readinessProbe"].update(perod=1),
        "Service": lambda item: item["spec"]["ports"][0].update(port="http"),
        "ScaledObject": lambda item: item["spec"]["triggers"][0]["metadata"].update(threshold=5),
        "ServiceMonitor": lambda item: item["spec"]["endpoints"][0].update(intervall="5s"),
        "InferencePool": lambda item: item["spec"].pop("endpointPickerRef"),
    }
    for kind, spoil in spoiled.items():
        item = copy.deepcopy(next(item for item in objects if item["kind"] == kind))
        validate(item, NEWEST)
        spoil(item)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            validate(item, NEWEST)


def test_helm_finds_nothing_to_complain_about() -> None:
    found = helm.lint(CHART, values=KEYS)
    assert not found["errors"]
    assert all("icon" in message["error"] for message in found["messages"])


def test_references_meet(objects: list[Object]) -> None:
    """Selectors match the pod, ports have the names they are called by, and what is mounted is there."""
    template = pod(objects)
    labels = template["metadata"]["labels"].items()
    for item in objects:
        spec = item.get("spec", {})
        found = spec.get("podSelector") or spec.get("selector") or {}
        assert found.get("matchLabels", found if item["kind"] == "Service" else {}).items() <= labels
        assert (
            spec.get("scaleTargetRef", {}).get("name", "demo-quire") == one(objects, "Deployment")["metadata"]["name"]
        )
    ports = {port["name"] for port in container(objects)["ports"]}
    assert {port["targetPort"] for port in one(objects, "Service")["spec"]["ports"]} == ports == {"http", "health"}
    mounted = [mount["name"] for mount in container(objects)["volumeMounts"]]
    assert sorted(mounted) == sorted(volume["name"] for volume in template["spec"]["volumes"])


@pytest.mark.parametrize("release", ["a", "quire", "a" * 53, "quire-" + "a" * 47])
def test_names_fit(release: str) -> None:
    """53 characters are the longest that Helm takes; a label has 63."""
    values = {**KEYS, "cache": {"persistence": True}}
    names = [item["metadata"]["name"] for item in render(values, release)]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names), names
    assert one(render(values, "quire"), "Service")["metadata"]["name"] == "quire"


# what a pod may do


def test_a_pod_has_no_privileges(objects: list[Object]) -> None:
    spec = pod(objects)["spec"]
    assert spec["automountServiceAccountToken"] is False
    image = read(ROOT / "Dockerfile").config("cpu")
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == int(image.user)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = container(objects)["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_only_volumes_can_be_written_and_all_of_them_have_a_bound(objects: list[Object]) -> None:
    volumes = {volume["name"]: volume for volume in pod(objects)["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(objects)["volumeMounts"]}
    image = read(ROOT / "Dockerfile").config("cpu")
    assert {*image.volumes, "/tmp", "/dev/shm"} <= set(mounts)
    for where in ("/cache", "/tmp", "/dev/shm"):
        volume = mounts[where]
        assert "persistentVolumeClaim" in volume or volume["emptyDir"]["sizeLimit"]


def test_services_of_the_namespace_are_not_told_in_variables(objects: list[Object], settings: Any) -> None:
    """A Service of the name quire would otherwise set QUIRE_PORT, which is an option of quire serve."""
    assert pod(objects)["spec"]["enableServiceLinks"] is False
    linked = {"QUIRE_PORT": "tcp://10.0.0.1:8000"}
    assert CliRunner().invoke(cli.app, ["serve"], env=linked).exit_code == 2


def test_nobody_is_let_out_unless_there_is_something_to_load() -> None:
    def egress(values: Object) -> list[Object]:
        return list(one(render({**KEYS, **values}), "NetworkPolicy")["spec"]["egress"])

    assert egress({}) == egress({"model": "/models/mine"}) == []
    assert egress({"model": "Qwen/Qwen3-0.6B", "networkPolicy": {"downloads": False}}) == []
    assert egress({"options": {"speculative-method": "nested", "speculative-model": "h/8"}}) == []
    for values in (
        {"model": "Qwen/Qwen3-0.6B"},
        {"options": {"speculative-method": "draft", "speculative-model": "owner/draft"}},
        {"networkPolicy": {"downloads": True}},
    ):
        (rule,) = egress(values)
        assert {port["port"] for port in rule["ports"]} == {53, 443}


def test_keys_are_in_a_secret_and_nowhere_else() -> None:
    objects = render({"auth": {"keys": ["key-of-alice", "key-of-bob"]}})
    assert one(objects, "Secret")["stringData"] == {"api-keys": "key-of-alice\nkey-of-bob"}
    assert "key-of" not in str([item for item in objects if item["kind"] != "Secret"])


# how it lives and ends


def test_probes_ask_routes_that_are_open_and_answered_on_the_port_of_their_own(objects: list[Object]) -> None:
    spec = container(objects)
    for name, path in (("startupProbe", "/ready"), ("livenessProbe", "/live"), ("readinessProbe", "/ready")):
        assert spec[name]["httpGet"] == {"path": path, "port": "health"}
        assert POLICIES[path].probe
        assert POLICIES[path].scope is None


def test_a_pod_is_given_the_time_that_it_takes_to_end(objects: list[Object], settings: Any) -> None:
    values = {**KEYS, "drain": {"preStopSeconds": 7, "timeoutSeconds": 120}}
    for rendered in (objects, render(values)):
        spec = pod(rendered)["spec"]
        (_, pause) = container(rendered)["lifecycle"]["preStop"]["exec"]["command"]
        drain = yaml.safe_load(one(rendered, "ConfigMap")["data"]["serve.yaml"])["drain-timeout"]
        assert spec["terminationGracePeriodSeconds"] > int(pause) + drain + CLOSE_SECONDS
    assert settings(render(values))[1].drain_timeout == 120


def test_a_start_is_given_the_time_that_is_asked_for() -> None:
    for seconds in (5, 600, 601, 1800):
        probe = container(render({**KEYS, "startup": {"timeoutSeconds": seconds}}))["startupProbe"]
        assert probe["failureThreshold"] == math.ceil(seconds / probe["periodSeconds"])


# what quire serve makes of it


def test_the_server_gets_what_was_set(settings: Any) -> None:
    engine, server = settings(
        render(
            {
                **NAMED,
                "model": "/models/mine",
                "service": {"port": 9000, "healthPort": 9001},
                "options": {
                    "max-model-len": 1048576,
                    "kv-cache-bytes": "2GiB",
                    "prefix-caching": False,
                    "served-model-name": ["a", "b"],
                    "kernels": {"attention": "reference"},
                },
            }
        )
    )
    assert (engine.model, engine.max_model_len, engine.kv_cache_bytes) == ("/models/mine", 1048576, 2 << 30)
    assert (engine.prefix_caching, engine.kernels) == (False, {"attention": "reference"})
    assert (server.host, server.port, server.health_port) == ("0.0.0.0", 9000, 9001)
    assert server.served_model_name == ("a", "b")
    assert server.api_keys_file is not None
    assert [key.name for key in load_keys(server.api_keys_file)] == ["alice"]


def test_the_page_is_off_unless_it_is_wanted(settings: Any) -> None:
    assert not settings(render(KEYS))[1].live_page
    assert settings(render({**KEYS, "livePage": True}))[1].live_page


def test_keys_and_doors(settings: Any) -> None:
    assert settings(render({"auth": {"keys": ["x", "y"]}}))[1].api_key == ("x", "y")
    assert settings(render(OPEN))[1].api_key == ()


def test_a_pool_is_told_under_the_names_that_its_picker_reads(settings: Any) -> None:
    objects = render(CHOICES["pool"])
    assert settings(objects)[1].vllm_metrics
    assert one(objects, "InferencePool")["spec"]["targetPorts"] == [{"number": 8000}]
    assert not settings(render(KEYS))[1].vllm_metrics


def test_other_options_make_other_pods() -> None:
    def checksums(values: Object) -> list[str]:
        annotations = pod(render({**KEYS, **values}))["metadata"]["annotations"]
        return [value for name, value in annotations.items() if name.startswith("checksum/")]

    assert checksums({}) == checksums({"podLabels": {"a": "b"}})
    assert checksums({}) != checksums({"options": {"max-num-seqs": 4}})
    assert checksums({}) != checksums({"auth": {"keys": ["another"]}})


# autoscaling


def queries() -> list[str]:
    return [
        trigger["metadata"]["query"] for trigger in one(render(CHOICES["keda"]), "ScaledObject")["spec"]["triggers"]
    ]


def test_replicas_are_left_to_the_autoscaler() -> None:
    assert one(render({**KEYS, "replicas": 3}), "Deployment")["spec"]["replicas"] == 3
    for name in ("hpa", "keda"):
        assert "replicas" not in one(render(CHOICES[name]), "Deployment")["spec"]


def test_both_autoscalers_watch_the_same_two_metrics_with_the_same_targets() -> None:
    metrics = one(render(CHOICES["hpa"]), "HorizontalPodAutoscaler")["spec"]["metrics"]
    by_hpa = {item["pods"]["metric"]["name"]: item["pods"]["target"]["averageValue"] for item in metrics}
    triggers = one(render(CHOICES["keda"]), "ScaledObject")["spec"]["triggers"]
    by_keda = {
        re.findall(r"quire_\w+", item["metadata"]["query"])[0]: item["metadata"]["threshold"] for item in triggers
    }
    assert by_hpa == by_keda == {"quire_num_requests_waiting": "5", "quire_kv_cache_usage_perc": "0.8"}


def test_keda_asks_for_this_release_alone() -> None:
    for query in queries():
        assert f'namespace="{NAMESPACE}"' in query
        assert 'service="demo-quire"' in query


# bad values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "auth: 0 of keys, namedKeys, existingSecret and insecureNoAuth are set; set exactly one"),
        ({"auth": {"keys": ["a"], "insecureNoAuth": True}}, "auth: 2 of keys"),
        ({**KEYS, "modle": "x"}, "additional properties 'modle' not allowed"),
        ({**KEYS, "replicas": "two"}, "at '/replicas': got string, want integer"),
        ({**KEYS, "autoscaling": {"kvUsage": 80}}, "at '/autoscaling/kvUsage': maximum: got 80, want 1"),
        ({**KEYS, "service": {"port": 80}}, "at '/service/port': minimum: got 80, want 1,024"),
        ({**KEYS, "service": {"port": 8001}}, "service.healthPort is 8001, as service.port is"),
        ({**KEYS, "options": {"max_model_len": 5}}, "'max_model_len'"),
        ({**KEYS, "options": {"port": 5000}}, "options.port is 5000: the chart writes it; set service.port"),
        ({**KEYS, "options": {"drain-timeout": 5}}, "set drain.timeoutSeconds"),
        ({**KEYS, "autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True}}}, "enable one"),
        ({**KEYS, "autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas is 5, above maxReplicas, 4"),
        ({**KEYS, "autoscaling": {"hpa": {"enabled": True}, "minReplicas": 0}}, "an HPA keeps at least 1"),
        ({**KEYS, "replicas": 2, "cache": {"persistence": True}}, "cache.accessMode is ReadWriteOnce"),
        (
            {**KEYS, "cache": {"existingClaim": "weights"}},
            "cache.existingClaim is weights and",
        ),
        ({**KEYS, "strategy": {"maxSurge": 0}}, "strategy.maxSurge and strategy.maxUnavailable are both 0"),
        ({**KEYS, "inferencePool": {"enabled": True}}, "inferencePool.endpointPicker is empty"),
        ({**KEYS, "image": {"digest": "latest"}}, "at '/image/digest'"),
        ({**KEYS, "serviceMonitor": {"bearerTokenSecret": {"key": ""}}}, "at '/serviceMonitor/bearerTokenSecret/key'"),
    ],
)
def test_bad_values_are_named(values: Object, says: str) -> None:
    with pytest.raises(helm.HelmError) as error:
        render(values)
    assert says in str(error.value)


def test_every_value_is_in_the_schema_and_explained() -> None:
    def keys(tree: Any, path: str = "") -> set[str]:
        if not isinstance(tree, dict) or not tree:
            return {path}
        return {key for name, inner in tree.items() for key in keys(inner, f"{path}/{name}")}

    def described(schema: Object, path: str = "") -> set[str]:
        if "properties" not in schema:
            return {path}
        return {key for name, inner in schema["properties"].items() for key in described(inner, f"{path}/{name}")}

    with helm.Chart.load(CHART) as chart:
        values, schema = chart.values, chart.schema
    assert schema is not None
    told, set_here = described(schema), keys(values)
    assert all(any(key.startswith(place) for place in told) for key in set_here)
    unset = {place for place in told if not any(key.startswith(place) or place.startswith(key) for key in set_here)}
    assert unset == {"/global"}  # Helm's own


def test_what_the_docs_tell_people_to_type_is_understood(settings: Any) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    installs = re.findall(r"\$ helm (?:install|upgrade) (?:.*\\\n)*.*", text)
    assert len(installs) == 2
    for command in installs:
        words = shlex.split(command.replace("\\\n", " "))
        told = helm.parse_set_string(",".join(words[at + 1] for at, word in enumerate(words) if word == "--set"))
        objects = render({**KEYS, **told})
        assert any(item["kind"] == "ScaledObject" for item in objects) == ("keda" in command)
    (values,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    engine, server = settings(render(yaml.safe_load(values)))
    assert (engine.model, engine.max_model_len, engine.scheduling_policy) == ("Qwen/Qwen3-8B", 16384, "fair")
    assert server.api_keys_file is not None
    (openshift,) = re.findall(r"--set (podSecurityContext\S+)`", text)
    context = pod(render({**KEYS, **helm.parse_set_string(openshift)}))["spec"]["securityContext"]
    assert {"runAsUser", "fsGroup"} & set(context) == set()


def test_versions_are_one() -> None:
    from quire import __version__

    with helm.Chart.load(CHART) as chart:
        assert chart.metadata["appVersion"] == chart.version == __version__
