"""What is in deploy/, without running it: it parses, uses fields that exist, and keeps its promises."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.config.run import RunConfig
from coordinator import session
from coordinator.cli import main
from tests.deploy.manifests import (
    DEPLOY,
    KUBERAY,
    OVERLAYS,
    ROOT,
    after_dashes,
    base,
    compose,
    documents,
    entrypoints,
    instructions,
    one,
    pods,
    rendered,
)

YAML = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])
DOCKERFILE = DEPLOY / "Dockerfile"
PINNED = re.compile(r"[\w./-]+:v?\d+(\.\d+)+[\w.-]*")
"""An image with a version of at least two numbers as its tag."""

PROMETHEUS = DEPLOY / "prometheus/prometheus.yml"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture
def kubectl() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")


def tool(name: str) -> str:
    """A program beside this Python or on the path; skips the test without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*argv: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def schemas() -> dict[str, Any]:
    return json.loads(gzip.decompress((ROOT / "tests/deploy/schemas.json.gz").read_bytes()))


def faults(item: Any) -> list[str]:
    """What the API does not know or takes otherwise, in a Kubernetes object."""
    schema = {**schemas()["kinds"][item["kind"]], "$defs": schemas()["$defs"]}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(item)]


def containers(job: Any) -> Iterator[Any]:
    for template in pods(job).values():
        yield from template["spec"]["containers"]


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_parses(path: Path) -> None:
    assert all(document for document in documents(path))


# ---------------------------------------------------------------------------------------------------------- KubeRay


def test_every_field_of_the_base_exists() -> None:
    assert {kind: faults(item) for kind, item in base().items()} == {kind: [] for kind in schemas()["kinds"]}


@overlays
def test_every_field_of_an_overlay_exists(kubectl: None, overlay: str) -> None:
    objects = rendered(overlay)
    assert {kind: faults(item) for kind, item in objects.items()} == {kind: [] for kind in schemas()["kinds"]}
    assert {item["metadata"].get("namespace", "metafleet") for item in objects.values()} == {"metafleet"}


@pytest.mark.parametrize(
    "where",
    ["spec", "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.autoscalerOptions",
     "spec.rayClusterSpec.headGroupSpec.template.spec", "spec.rayClusterSpec.headGroupSpec.template.metadata"],
)  # fmt: skip
def test_a_field_that_does_not_exist_would_be_found(where: str) -> None:
    job = base()["RayJob"]
    node = functools.reduce(lambda item, key: item[key], where.split("."), job)
    node["gracePeriod"] = 1
    (fault,) = faults(job)
    assert "'gracePeriod' was unexpected" in fault


@overlays
def test_pods_have_no_more_rights_than_they_need(kubectl: None, overlay: str) -> None:
    job = rendered(overlay)["RayJob"]
    for template in pods(job).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all({"emptyDir", "persistentVolumeClaim"} & volume.keys() for volume in spec["volumes"])
    for container in (*containers(job), job["spec"]["rayClusterSpec"]["autoscalerOptions"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


@overlays
def test_pods_reserve_what_they_may_use(kubectl: None, overlay: str) -> None:
    job = rendered(overlay)["RayJob"]
    for container in (*containers(job), job["spec"]["rayClusterSpec"]["autoscalerOptions"]):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    worker = pods(job)["worker"]["spec"]["containers"][0]
    assert ("nvidia.com/gpu" in worker["resources"]["limits"]) == (overlay == "gpu")


@overlays
def test_a_cluster_is_what_its_overlay_says(kubectl: None, overlay: str) -> None:
    job = rendered(overlay)["RayJob"]["spec"]
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    assert 0 < workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]
    assert workers["groupName"] == {"cpu": "workers", "gpu": "gpu-workers"}[overlay]
    assert {c["image"] for c in containers({"spec": job})} == {f"registry.example/metafleet:{overlay}"}
    plain = base()["RayJob"]["spec"]["entrypoint"]
    gpus = " --device auto --execution.gpus_per_worker 1" if overlay == "gpu" else ""
    assert job["entrypoint"] == plain + gpus


def test_a_stopped_or_failed_job_can_go_on() -> None:
    job = base()["RayJob"]["spec"]
    head = pods(base()["RayJob"])["head"]["spec"]
    words = entrypoints()["kuberay/base"]
    folder = Path(words[words.index("--run-dir") + 1]).parent
    (mount,) = (m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == str(folder))
    (volume,) = (v for v in head["volumes"] if v["name"] == mount["name"])
    assert volume["persistentVolumeClaim"]["claimName"] == base()["PersistentVolumeClaim"]["metadata"]["name"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
    grace = int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert head["terminationGracePeriodSeconds"] > grace >= 60


def program(path: Path, after: str) -> Path:
    """One that says that it is ready in the file ``ready``, and after SIGTERM does something more."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, signal, sys, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "pathlib.Path('ready').touch()\n"
        "signal.sigwait([signal.SIGTERM])\n"
        f"{after}\n"
    )
    path.chmod(0o755)
    return path


def passes_alone(folder: Path, *lines: str) -> None:
    """A script that ends well, in a process namespace of its own: outside it, pkill would find the runs of others."""
    alone = (tool("unshare"), "--pid", "--fork", "--mount-proc")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make process namespaces")
    (folder / "script").write_text("\n".join(("set -e", *lines)))
    passes(*alone, "bash", str(folder / "script"), cwd=folder)


WRITES = "time.sleep(0.3); pathlib.Path('written').touch()"
READY = "timeout 30 sh -c 'until [ -e ready ]; do sleep 0.05; done'; rm ready"


@pytest.fixture(
    params=["bin/metafleet train glyphs-maml", f"{sys.executable} -m coordinator.job 3.11 train x.toml",
            f"{sys.executable} -m coordinator train glyphs-maml"],
)  # fmt: skip
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The command line of a run: of the recipe's job, by `metafleet submit`, by `ray job submit`."""
    for name in ("bin/metafleet", "coordinator/__main__.py", "coordinator/job.py"):
        program(tmp_path / name, WRITES)
    (tmp_path / "coordinator/__init__.py").touch()
    return str(request.param)


def test_the_head_waits_until_its_runs_have_written_their_checkpoints(tmp_path: Path, run: str) -> None:
    stop = pods(base()["RayJob"])["head"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    passes_alone(tmp_path, f"{run} &", READY, shlex.join(stop), "[ -e written ]")


def test_a_stopped_head_of_compose_has_its_runs_write_their_checkpoints_first(tmp_path: Path, run: str) -> None:
    ray = program(tmp_path / "ray", "sys.exit(7 if pathlib.Path('written').exists() else 8)")
    service = compose()["services"]["head"]
    assert service["entrypoint"][:2] == json.loads(dict(instructions(DOCKERFILE))["ENTRYPOINT"])
    assert service["command"][:2] == ["ray", "start"] and service["stop_grace_period"] == "120s"
    head = shlex.join([*service["entrypoint"][2:], str(ray), *service["command"][1:]])
    # The shell that Ray starts a job with goes on until its run ends: were it told too, Ray would kill the run.
    job = shlex.join(["sh", "-c", f"{run}; exit 9"])
    ends = 'code=0; wait "$head" || code=$?; [ "$code" = 7 ]; wait "$job" || code=$?; [ "$code" = 9 ]'
    passes_alone(tmp_path, f"{head} & head=$!", READY, f"{job} & job=$!", READY, 'kill -TERM "$head"', ends)


def test_prometheus_reaches_the_named_ports_of_the_pods_that_it_selects() -> None:
    job, policy, monitor = (base()[kind] for kind in ("RayJob", "NetworkPolicy", "PodMonitor"))
    app = {"app": "metafleet"}
    assert all(template["metadata"]["labels"].items() >= app.items() for template in pods(job).values())
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"] == {"matchLabels": app}
    named = {port["name"]: port["containerPort"] for c in containers(job) for port in c.get("ports", ())}
    scraped = [named[endpoint["port"]] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    (rule,) = (r for r in policy["spec"]["ingress"] if "prometheus" in str(r))
    assert sorted(scraped) == sorted(port["port"] for port in rule["ports"])
    words = entrypoints()["kuberay/base"]
    assert named["run"] == int(words[words.index("--execution.metrics_port") + 1])


def test_every_cluster_of_a_rayjob_is_the_same_run_to_prometheus() -> None:
    (endpoint,) = (e for e in base()["PodMonitor"]["spec"]["podMetricsEndpoints"] if e["port"] == "run")
    (rule,) = (rule for rule in endpoint["relabelings"] if rule["targetLabel"] == "run")
    (source,) = rule["sourceLabels"]
    labels = pods(base()["RayJob"])["head"]["metadata"]["labels"]
    assert labels[source.removeprefix("__meta_kubernetes_pod_label_")] == base()["RayJob"]["metadata"]["name"]


def test_the_operator_reaches_the_head_however_it_was_installed() -> None:
    (rule,) = (rule for rule in base()["NetworkPolicy"]["spec"]["ingress"] if "operator" in str(rule))
    assert [port["port"] for port in rule["ports"]] == [8265]
    name, component = "app.kubernetes.io/name", "app.kubernetes.io/component"
    # KubeRay gives the pods of every cluster that name as well, so that it is not enough.
    assert [peer["podSelector"]["matchLabels"] for peer in rule["from"]] == [
        {name: "kuberay-operator"},
        {name: "kuberay", component: "kuberay-operator"},
    ]


def test_names_are_resolved_also_by_a_cache_on_the_node() -> None:
    (rule,) = (r for r in base()["NetworkPolicy"]["spec"]["egress"] if {53} == {p["port"] for p in r.get("ports", ())})
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"] and "kube-dns" in str(rule["to"])
    assert {port["protocol"] for port in rule["ports"]} == {"UDP", "TCP"}


def test_nobody_else_reaches_the_pods() -> None:
    rules = base()["NetworkPolicy"]["spec"]["ingress"]
    assert all("podSelector" in peer for rule in rules for peer in rule["from"])
    assert [rule for rule in rules if "ports" not in rule] == [
        {"from": [{"podSelector": {"matchLabels": {"app": "metafleet"}}}]}
    ]


# ------------------------------------------------------------------------------------------------------- Dockerfile


def test_the_image_is_pinned_and_runs_as_nobody_special() -> None:
    steps = list(instructions(DOCKERFILE))
    assert all(PINNED.fullmatch(rest.split(" ")[0]) for name, rest in steps if name == "FROM")
    last = [name for name, _ in steps]
    users = [rest for name, rest in steps if name == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    assert {"HEALTHCHECK", "ENTRYPOINT", "CMD"} <= set(last[last.index("USER") :])
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["tini", "--"]


def test_the_image_is_built_from_what_is_there_and_sent() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    sent = [line[1:] for line in lines if line.startswith("!")]
    copied = [word for name, rest in instructions(DOCKERFILE) if name == "COPY" and not rest.startswith("--from")
              for word in rest.split()[:-1]]  # fmt: skip
    assert all((ROOT / name).exists() for name in copied)
    assert sorted(copied) == sorted(sent)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) <= set(copied)


def test_the_dockerfile_passes_hadolint() -> None:
    passes(tool("hadolint"), str(DOCKERFILE))


def test_the_same_versions_everywhere() -> None:
    pins = dict(rest.split("=", 1) for name, rest in instructions(DOCKERFILE) if name == "ARG")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    launcher = (DEPLOY / "ray-cluster.yaml").read_text("utf-8")
    assert base()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pins["RAY"]
    assert f'"ray[default]=={pins["RAY"]}"' in launcher
    assert f"torch=={pins['TORCH']} torchvision=={pins['TORCHVISION']}" in launcher
    assert set(re.findall(r"metafleet-([\d.]+)-py3", launcher)) == {project["version"]}


# ---------------------------------------------------------------------------------------------- compose, Prometheus


def test_compose_publishes_on_localhost_only() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_compose_holds_no_secret_and_uses_tokens() -> None:
    for name in ("head", "worker", "train"):
        environment = compose()["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_compose_mounts_what_is_there() -> None:
    config = compose()
    for service in config["services"].values():
        assert service["security_opt"] == ["no-new-privileges:true"] and service["cap_drop"] == ["ALL"]
        assert "build" in service or PINNED.fullmatch(service["image"])
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert (DEPLOY / source).exists() if source.startswith(".") else source in config["volumes"]
    build = config["services"]["head"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]) == DOCKERFILE


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    grafana = compose()["services"]["grafana"]
    mounts = dict(volume.split(":")[1::-1] for volume in grafana["volumes"])
    (provider,) = one(DEPLOY / "grafana/provisioning/dashboards/metafleet.yml")["providers"]
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    (source,) = one(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["type"] == source["uid"] == "prometheus" and source["isDefault"]
    host = re.fullmatch(r"http://(\w+):9090", grafana["environment"][source["url"].strip("${}")])
    assert host and host[1] in compose()["services"]


def test_a_worker_container_offers_the_cpus_that_it_may_use() -> None:
    for more, cpus, memory in (({}, 2, "4g"), ({"WORKER_CPUS": "6", "WORKER_MEMORY": "9g"}, 6, "9g")):
        worker = compose(**more)["services"]["worker"]
        assert (worker["cpus"], worker["mem_limit"]) == (cpus, memory)
        assert f"--num-cpus={cpus}" in worker["command"]
    assert "--num-cpus=0" in compose()["services"]["head"]["command"]


@pytest.mark.parametrize("name", ["head", "worker"])
def test_the_object_store_fits_into_the_shared_memory_of_its_container(name: str) -> None:
    service = compose()["services"][name]
    (store,) = (word.partition("=")[2] for word in service["command"] if word.startswith("--object-store-memory="))
    assert 0 < int(store) < int(service["shm_size"].removesuffix("gb")) * 2**30


def test_on_gpus_compose_gives_them_to_its_workers() -> None:
    worker = compose(gpus=True)["services"]["worker"]
    assert worker["gpus"] == "all" and "gpus" not in compose()["services"]["worker"]
    assert "--scale worker=1" in (DEPLOY / "compose.yaml").read_text("utf-8")  # else each container offers all of them


def scraped_in_compose() -> dict[str, Any]:
    """What Prometheus reads in compose, by the names of its jobs."""
    volumes = (volume.split(":") for volume in compose()["services"]["prometheus"]["volumes"])
    (source,) = (source for source, target, *_ in volumes if target.endswith("/prometheus.yml"))
    return {job["job_name"]: job for job in one(DEPLOY / source)["scrape_configs"]}


def test_a_run_in_compose_is_announced_where_prometheus_looks() -> None:
    services = compose()["services"]
    words = after_dashes(services["train"]["command"])
    (folder,) = (word.partition("=")[2] for word in words if word.startswith("--execution.metrics_discovery="))
    (volume,) = (v.partition(":")[0] for v in services["train"]["volumes"] if v.endswith(f":{folder}"))
    (config,) = (v.split(":")[1] for v in services["prometheus"]["volumes"] if v.endswith("/prometheus.yml:ro"))
    (mounted,) = (v.split(":")[1] for v in services["prometheus"]["volumes"] if v.startswith(f"{volume}:"))
    (discovery,) = scraped_in_compose()["metafleet"]["file_sd_configs"]
    assert discovery["files"] == [str((Path(mounted) / "*.json").relative_to(Path(config).parent))]
    assert f"--config.file={config}" in services["prometheus"]["command"]


def test_prometheus_finds_the_nodes_of_compose() -> None:
    services = compose()["services"]
    (discovery,) = scraped_in_compose()["ray"]["dns_sd_configs"]
    assert {name for name in services if "start" in services[name].get("command", ())} == set(discovery["names"])
    for name in discovery["names"]:
        assert f"--metrics-export-port={discovery['port']}" in services[name]["command"]


def test_prometheus_looks_up_the_names_of_compose_there_alone() -> None:
    here, there = one(PROMETHEUS), one(PROMETHEUS.with_name("compose.yml"))
    assert "dns_sd_configs" not in PROMETHEUS.read_text("utf-8")
    for config in (here, there):
        ray = next(job for job in config["scrape_configs"] if job["job_name"] == "ray")
        for source in ("dns_sd_configs", "file_sd_configs"):
            ray.pop(source, None)
    assert here == there


@pytest.mark.parametrize("name", ["prometheus.yml", "compose.yml"])
def test_promtool_takes_the_configuration_and_its_rules(name: str) -> None:
    passes(tool("promtool"), "check", "config", str(PROMETHEUS.with_name(name)))


# ------------------------------------------------------------------------------------------------------ entrypoints


@pytest.mark.parametrize("where", entrypoints())
def test_every_entrypoint_is_one_that_the_command_takes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[RunConfig] = []
    monkeypatch.setattr(session, "train_command", lambda config, **_: trained.append(config) or {})
    words = entrypoints()[where]
    assert words[0] == "metafleet" and main(words[1:]) == 0
    (config,) = trained
    execution = config.execution
    assert (execution.run_dir, execution.workers) == ("/shared/run", None)
    assert execution.address == ("local" if where == "Dockerfile" else "auto")
    on_gpus = where in ("compose.yaml on GPUs", "kuberay/overlays/gpu")
    assert (config.device, execution.gpus_per_worker) == (("auto", 1) if on_gpus else ("cpu", 0))
    if where != "Dockerfile":
        assert (execution.metrics_host, execution.metrics_port) == ("0.0.0.0", 9464)


def test_overlays_are_those_that_are_tested() -> None:
    assert sorted(path.name for path in (KUBERAY / "overlays").iterdir()) == sorted(OVERLAYS)
