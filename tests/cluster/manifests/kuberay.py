"""What KubeRay's published schemas (CustomResourceDefinitions of ray.io/v1) take, as far as our
manifests go: names, types, required fields and choices. Every object is closed, as `kubectl apply`
has it. Read from ray-project/kuberay, helm-chart/kuberay-operator/crds:

    ray.io_rayclusters.yaml  at 017710c025a86af5225c0e68cd78fb06e2918296
    ray.io_rayjobs.yaml      at 037e91b0e311e6240431a4dcb111fab341a6f613, of an older operator

Of the fields that a cluster of ours may use, those are here that both know, and required if either
requires them, so that our files suit both operators. Rules beyond types, as of the lengths of
names, are not here: what they refuse is found by a cluster alone. The claim is what an ephemeral
volume's template holds there.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
INT64: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
YES: Schema = {"type": "boolean"}
PORT: Schema = {"type": ["integer", "string"]}
QUANTITY: Schema = {
    "type": ["integer", "string"],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}


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


def named(values: Schema) -> Schema:
    """An object whose names are anybody's."""
    return {"type": "object", "additionalProperties": values}


TEXTS, QUANTITIES = named(TEXT), named(QUANTITY)
METADATA = of(annotations=TEXTS, finalizers=many(TEXT), labels=TEXTS, name=TEXT, namespace=TEXT)
KEY = of("key", key=TEXT, name=TEXT, optional=YES)
FIELD = of("fieldPath", apiVersion=TEXT, fieldPath=TEXT)
AMOUNT = of("resource", containerName=TEXT, divisor=QUANTITY, resource=TEXT)
VALUE = of(configMapKeyRef=KEY, fieldRef=FIELD, resourceFieldRef=AMOUNT, secretKeyRef=KEY)
ENVIRONMENT = many(of("name", name=TEXT, value=TEXT, valueFrom=VALUE))
OTHER = of(name=TEXT, optional=YES)
ENVIRONMENTS = many(of(configMapRef=OTHER, prefix=TEXT, secretRef=OTHER))
RESOURCES = of(claims=many(of("name", name=TEXT)), limits=QUANTITIES, requests=QUANTITIES)
MOUNTS = many(
    of(
        "mountPath",
        "name",
        mountPath=TEXT,
        mountPropagation=TEXT,
        name=TEXT,
        readOnly=YES,
        recursiveReadOnly=TEXT,
        subPath=TEXT,
        subPathExpr=TEXT,
    )
)
PROFILE = of("type", localhostProfile=TEXT, type=TEXT)
SE_LINUX = of(level=TEXT, role=TEXT, type=TEXT, user=TEXT)
CONFINED = of(
    allowPrivilegeEscalation=YES,
    appArmorProfile=PROFILE,
    capabilities=of(add=many(TEXT), drop=many(TEXT)),
    privileged=YES,
    procMount=TEXT,
    readOnlyRootFilesystem=YES,
    runAsGroup=INT64,
    runAsNonRoot=YES,
    runAsUser=INT64,
    seLinuxOptions=SE_LINUX,
    seccompProfile=PROFILE,
)
HEADERS = many(of("name", "value", name=TEXT, value=TEXT))
PROBE = of(
    exec=of(command=many(TEXT)),
    failureThreshold=INT32,
    grpc=of("port", port=INT32, service=TEXT),
    httpGet=of("port", host=TEXT, httpHeaders=HEADERS, path=TEXT, port=PORT, scheme=TEXT),
    initialDelaySeconds=INT32,
    periodSeconds=INT32,
    successThreshold=INT32,
    tcpSocket=of("port", host=TEXT, port=PORT),
    terminationGracePeriodSeconds=INT64,
    timeoutSeconds=INT32,
)
PORTS = of(
    "containerPort", containerPort=INT32, hostIP=TEXT, hostPort=INT32, name=TEXT, protocol=TEXT
)
CONTAINER = of(
    "name",
    args=many(TEXT),
    command=many(TEXT),
    env=ENVIRONMENT,
    envFrom=ENVIRONMENTS,
    image=TEXT,
    imagePullPolicy=TEXT,
    livenessProbe=PROBE,
    name=TEXT,
    ports=many(PORTS),
    readinessProbe=PROBE,
    resources=RESOURCES,
    securityContext=CONFINED,
    startupProbe=PROBE,
    volumeMounts=MOUNTS,
    workingDir=TEXT,
)
VOLUME = of(
    "name",
    emptyDir=of(medium=TEXT, sizeLimit=QUANTITY),
    hostPath=of("path", path=TEXT, type=TEXT),
    name=TEXT,
    nfs=of("path", "server", path=TEXT, readOnly=YES, server=TEXT),
    persistentVolumeClaim=of("claimName", claimName=TEXT, readOnly=YES),
)
TOLERATION = of(effect=TEXT, key=TEXT, operator=TEXT, tolerationSeconds=INT64, value=TEXT)
POD = of(
    metadata=METADATA,
    spec=of(
        "containers",
        containers=many(CONTAINER),
        initContainers=many(CONTAINER),
        nodeSelector=TEXTS,
        priorityClassName=TEXT,
        restartPolicy=TEXT,
        runtimeClassName=TEXT,
        securityContext=of(
            fsGroup=INT64,
            fsGroupChangePolicy=TEXT,
            runAsGroup=INT64,
            runAsNonRoot=YES,
            runAsUser=INT64,
            seLinuxOptions=SE_LINUX,
            seccompProfile=PROFILE,
            supplementalGroups=many(INT64),
        ),
        serviceAccountName=TEXT,
        terminationGracePeriodSeconds=INT64,
        tolerations=many(TOLERATION),
        volumes=many(VOLUME),
    ),
)
CLUSTER = of(
    "headGroupSpec",
    autoscalerOptions=of(
        env=ENVIRONMENT,
        envFrom=ENVIRONMENTS,
        idleTimeoutSeconds=INT32,
        image=TEXT,
        imagePullPolicy=TEXT,
        resources=RESOURCES,
        securityContext=CONFINED,
        upscalingMode={"type": "string", "enum": ["Default", "Aggressive", "Conservative"]},
        volumeMounts=MOUNTS,
    ),
    enableInTreeAutoscaling=YES,
    headGroupSpec=of(
        "rayStartParams",
        "template",
        enableIngress=YES,
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
            "maxReplicas",
            "minReplicas",
            "rayStartParams",
            "template",
            groupName=TEXT,
            maxReplicas=INT32,
            minReplicas=INT32,
            numOfHosts=INT32,
            rayStartParams=TEXTS,
            replicas=INT32,
            scaleStrategy=of(workersToDelete=many(TEXT)),
            template=POD,
        )
    ),
)
JOB = of(
    "entrypoint",
    activeDeadlineSeconds=INT32,
    backoffLimit=INT32,
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
    submissionMode=TEXT,
    submitterConfig=of(backoffLimit=INT32),
    submitterPodTemplate=POD,
    suspend=YES,
    ttlSecondsAfterFinished=INT32,
)
CLAIM = of(
    accessModes=many(TEXT),
    resources=of(limits=QUANTITIES, requests=QUANTITIES),
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
        apiVersion={"type": "string", "const": version},
        kind={"type": "string", "const": kind},
        metadata={**METADATA, "required": ["name"]},
        spec=spec,
    )


KINDS = {
    "raycluster.yaml": resource("ray.io/v1", "RayCluster", CLUSTER),
    "rayjob.yaml": resource("ray.io/v1", "RayJob", JOB),
    "storage.yaml": resource("v1", "PersistentVolumeClaim", CLAIM),
}
