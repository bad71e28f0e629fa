"""Makes schemas.json.gz, against which test_manifests.py checks the manifests: every field must exist, with its type.

    pip install kubernetes-validate    # has the JSON schemas of Kubernetes itself
    python tests/deploy/make_schemas.py

KubeRay's part is written here from the Go types of which controller-gen makes the CRDs in ray-operator/config/crd/bases
(ray-project/kuberay, ray-operator/apis/ray/v1/raycluster_types.go and the API reference made from them, as of KubeRay
1.7; not all their fields are here). PodMonitor's is from prometheus-operator's pkg/apis/monitoring/v1. The CRDs embed
Kubernetes' own pod template, of 1.28 here: what exists there exists in every later one.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

KUBERNETES = "1.28.0"
TARGET = Path(__file__).with_name("schemas.json.gz")
CORE = "io.k8s.api.core.v1."
TEXT, FLAG, WHOLE, NUMBER = ({"type": kind} for kind in ("string", "boolean", "integer", "number"))
TEXTS = {"type": "object", "additionalProperties": TEXT}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(required: str = "", **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these fields and no others; ``required`` names some."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = ref("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
    return fields(
        "apiVersion kind metadata spec", apiVersion=one_of(version), kind=one_of(kind), metadata=metadata, spec=spec
    )


# What a CRD keeps of an embedded object's metadata.
EMBEDDED = fields(annotations=TEXTS, finalizers=listed(TEXT), labels=TEXTS, name=TEXT, namespace=TEXT)
TEMPLATE = fields(metadata=EMBEDDED, spec=ref(f"{CORE}PodSpec"))
RULES = {
    "ingressRules": listed(ref("io.k8s.api.networking.v1.NetworkPolicyIngressRule")),
    "egressRules": listed(ref("io.k8s.api.networking.v1.NetworkPolicyEgressRule")),
}
AUTOSCALER = fields(
    resources=ref(f"{CORE}ResourceRequirements"),
    image=TEXT,
    imagePullPolicy=TEXT,
    securityContext=ref(f"{CORE}SecurityContext"),
    idleTimeoutSeconds=WHOLE,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=listed(ref(f"{CORE}EnvVar")),
    envFrom=listed(ref(f"{CORE}EnvFromSource")),
    volumeMounts=listed(ref(f"{CORE}VolumeMount")),
    command=listed(TEXT),
    args=listed(TEXT),
)
HEAD = fields(
    "rayStartParams template",
    template=TEMPLATE,
    headService=ref(f"{CORE}Service"),
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKERS = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    suspend=FLAG,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    priority=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
    scaleStrategy=fields(workersToDelete=listed(TEXT)),
    numOfHosts=WHOLE,
)
RAY_CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(enableK8sTokenAuth=FLAG, secretName=TEXT, mode=one_of("disabled", "token")),
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    networkPolicy=fields(
        mode=one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"), head=fields(**RULES), worker=fields(**RULES)
    ),
    tlsOptions=fields(enabled=FLAG),
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs=listed(WORKERS),
)
RAY_JOB = fields(
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec=RAY_CLUSTER,
    submitterPodTemplate=TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=WHOLE),
    managedBy=TEXT,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
RELABEL = fields(
    sourceLabels=listed(TEXT),
    separator=TEXT,
    targetLabel=TEXT,
    regex=TEXT,
    modulus=WHOLE,
    replacement=TEXT,
    action=TEXT,
)
POD_MONITOR = fields(
    "podMetricsEndpoints selector",
    jobLabel=TEXT,
    podTargetLabels=listed(TEXT),
    selector=ref("io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector"),
    namespaceSelector=fields(any=FLAG, matchNames=listed(TEXT)),
    sampleLimit=WHOLE,
    podMetricsEndpoints=listed(
        fields(
            port=TEXT,
            path=TEXT,
            scheme=one_of("http", "https"),
            interval=TEXT,
            scrapeTimeout=TEXT,
            honorLabels=FLAG,
            relabelings=listed(RELABEL),
            metricRelabelings=listed(RELABEL),
        )
    ),
)
KINDS = {
    "RayJob": resource("ray.io/v1", "RayJob", RAY_JOB),
    "PodMonitor": resource("monitoring.coreos.com/v1", "PodMonitor", POD_MONITOR),
    "NetworkPolicy": ref("io.k8s.api.networking.v1.NetworkPolicy"),
    "PersistentVolumeClaim": ref(f"{CORE}PersistentVolumeClaim"),
    "Namespace": ref(f"{CORE}Namespace"),
}


def stripped(node: Any) -> Any:
    """Without descriptions, and with references into this file."""
    if isinstance(node, list):
        return [stripped(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {k: stripped(v) for k, v in node.items() if not (k == "description" and isinstance(v, str))}
    return kept | ({"$ref": "#" + node["$ref"].rpartition("#")[2]} if isinstance(node.get("$ref"), str) else {})


def used(node: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that ``node`` needs, and those that they need."""
    found: dict[str, Any] = {}
    open_ends = [json.dumps(node)]
    while open_ends:
        for name in re.findall(r'"#/\$defs/([^"]+)"', open_ends.pop()):
            if name not in found:
                found[name] = stripped(definitions[name])
                open_ends.append(json.dumps(found[name]))
    return found


def main() -> None:
    import kubernetes_validate

    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text("utf-8"))["$defs"]
    schemas = {"kinds": KINDS, "$defs": used(KINDS, definitions)}
    TARGET.write_bytes(gzip.compress(json.dumps(schemas, sort_keys=True).encode(), mtime=0))


if __name__ == "__main__":
    main()
