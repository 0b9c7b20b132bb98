"""Why another library could not load a model, for sentences of ours."""


def untrusted(error: BaseException, *, trust: str) -> str | None:
    """Which option of ours lets a model's own code run, `trust`, where a library's error is that it
    may not; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        "it comes with code of its own, which runs only where the config trusts it; read that "
        f"code, then set {trust}=true"
    )
