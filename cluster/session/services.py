"""Teacher services that a command works on: the one it names, or the only one there is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.session.session import attached, joined
from shared.config.run import Config
from shared.errors import ConfigError


def services_of(config: Config, given: str | None) -> Mapping[str, str] | None:
    """Services by teacher, from what `--service` says: one name, or TEACHER=SERVICE for each of
    several, with commas between. None where it says nothing. Raises ConfigError."""
    if given is None:
        return None
    teachers = tuple(config.teachers)
    if len(teachers) == 1 and "=" not in given:
        return {teachers[0]: given}
    pairs: dict[str, str] = {}
    for pair in given.split(","):
        name, _, pairs[name] = pair.partition("=")
    if set(pairs) != set(teachers) or not all(pairs.values()):
        wanted = ",".join(f"{name}=SERVICE" for name in teachers)
        raise ConfigError(
            f"--service is {given}, but the config has the teacher{'s' * (len(teachers) > 1)} "
            f"{', '.join(teachers)}; say --service {wanted}, or leave it out where services have "
            "their teachers' names"
        )
    return {name: pairs[name] for name in teachers}


def named_services(config: Config) -> Mapping[str, str]:
    """What `teacher up` and `train` call the services of a config: by the teachers' names."""
    return {name: name for name in config.teachers}


@contextmanager
def reached(address: str | None, services: Mapping[str, str] | None) -> Iterator[None]:
    """Be, before any work and for the length of a `with`, where a command finds what is running
    already: the services it names, or without any the cluster it joins. Where it starts a cluster
    of its own, `connected` inside does so. Raises PlacementError or ConfigError for what is not
    there."""
    with (joined if services is None else attached)(address):
        for name in (services or {}).values():
            find_service(name)
        yield


def find_service(service: str | None) -> str:
    """The named service, or the one there is."""
    from teacher_service.service import service as services

    names = services.list_services()
    if service is not None and service not in names:
        raise ConfigError(
            f"no teacher service named {service} is running; there is {', '.join(names) or 'none'}"
        )
    if service is None and len(names) != 1:
        raise ConfigError(
            "no teacher service is running; `tutelage teacher up CONFIG` starts one"
            if not names
            else f"{len(names)} teacher services are running; name one with --service: "
            f"{', '.join(names)}"
        )
    return service or names[0]
