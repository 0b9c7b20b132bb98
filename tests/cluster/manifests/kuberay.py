"""What KubeRay's published types (ray.io/v1) and Kubernetes' take, as far as our manifests go: the
whole of the Ray parts, and of pods the fields that a cluster of ours may use."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
YES: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY: Schema = {}
QUANTITY: Schema = {
    "type": ["string", "integer"],
    "pattern": r"^[+-]?[0-9]+(\.[0-9]*)?([KMGTPE]i|[numkMGTPE])?$",
}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}


def of(*required: str, **properties: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def many(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


KEY_OF_SECRET = of("key", key=TEXT, name=TEXT, optional=YES)
ENVIRONMENT = many(of("name", name=TEXT, value=TEXT, valueFrom=of(secretKeyRef=KEY_OF_SECRET)))
RESOURCES = of(requests=QUANTITIES, limits=QUANTITIES)
MOUNTS = many(of("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=YES, subPath=TEXT))
CONFINED = of(
    allowPrivilegeEscalation=YES,
    capabilities=of(add=many(TEXT), drop=many(TEXT)),
    privileged=YES,
    readOnlyRootFilesystem=YES,
    runAsNonRoot=YES,
    runAsUser=NUMBER,
    runAsGroup=NUMBER,
    seccompProfile=of("type", type=TEXT, localhostProfile=TEXT),
)
PROBE = of(
    exec=of(command=many(TEXT)),
    httpGet=of("port", path=TEXT, port=ANY, scheme=TEXT),
    initialDelaySeconds=NUMBER,
    periodSeconds=NUMBER,
    timeoutSeconds=NUMBER,
    successThreshold=NUMBER,
    failureThreshold=NUMBER,
)
CONTAINER = of(
    "name",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    ports=many(of("containerPort", name=TEXT, containerPort=NUMBER, protocol=TEXT)),
    env=ENVIRONMENT,
    resources=RESOURCES,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    securityContext=CONFINED,
    volumeMounts=MOUNTS,
)
VOLUME = of(
    "name",
    name=TEXT,
    persistentVolumeClaim=of("claimName", claimName=TEXT, readOnly=YES),
    emptyDir=of(medium=TEXT, sizeLimit=QUANTITY),
)
POD = of(
    metadata=of(labels=TEXTS, annotations=TEXTS),
    spec=of(
        "containers",
        containers=many(CONTAINER),
        volumes=many(VOLUME),
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        serviceAccountName=TEXT,
        nodeSelector=TEXTS,
        tolerations=many(ANY),
        terminationGracePeriodSeconds=NUMBER,
        securityContext=of(
            runAsNonRoot=YES,
            runAsUser=NUMBER,
            runAsGroup=NUMBER,
            fsGroup=NUMBER,
            seccompProfile=of("type", type=TEXT),
        ),
    ),
)
CLUSTER = of(
    "headGroupSpec",
    autoscalerOptions=of(
        env=ENVIRONMENT,
        envFrom=many(ANY),
        idleTimeoutSeconds=NUMBER,
        image=TEXT,
        imagePullPolicy=TEXT,
        resources=RESOURCES,
        securityContext=CONFINED,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        volumeMounts=MOUNTS,
    ),
    enableInTreeAutoscaling=YES,
    headGroupSpec=of(
        "rayStartParams",
        "template",
        enableIngress=YES,
        headService=ANY,
        rayStartParams=TEXTS,
        serviceType=TEXT,
        template=POD,
    ),
    headServiceAnnotations=TEXTS,
    rayVersion=TEXT,
    suspend=YES,
    workerGroupSpecs=many(
        of(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            rayStartParams=TEXTS,
            scaleStrategy=ANY,
            template=POD,
        )
    ),
)
JOB = of(
    activeDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    clusterSelector=TEXTS,
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    rayClusterSpec=CLUSTER,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=YES,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterConfig=of(backoffLimit=NUMBER),
    submitterPodTemplate=POD,
    suspend=YES,
    ttlSecondsAfterFinished=NUMBER,
)
CLAIM = of(
    accessModes=many({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]}),
    resources=RESOURCES,
    storageClassName=TEXT,
    volumeName=TEXT,
)


def resource(version: str, kind: str, spec: Schema) -> Schema:
    """A manifest of one kind."""
    return of(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=of("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=spec,
    )


KINDS = {
    "raycluster.yaml": resource("ray.io/v1", "RayCluster", CLUSTER),
    "rayjob.yaml": resource("ray.io/v1", "RayJob", JOB),
    "storage.yaml": resource("v1", "PersistentVolumeClaim", CLAIM),
}
