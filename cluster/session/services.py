"""Teacher services that a command works on: the one it names, or the only one there is."""

from shared.errors import ConfigError


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
