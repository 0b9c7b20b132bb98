"""A run's standing for the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.report.standing import Standing
from shared.in_words import duration, thousands

BAR_WIDTH = 60
STALE_S = 120.0  # without a line for so long, a run at work is worth a look
STYLES = {"at work": "green", "finished": "bold green", "failed": "bold red"}


def view(standing: Standing) -> RenderableType:
    """Headline, progress, numbers of the last line, domains, replicas, and what went wrong."""
    parts = [_headline(standing), _bar(standing), _numbers(standing)]
    if standing["domains"]:
        parts += [Text(), _domains(standing)]
    if standing["services"]:
        parts += [Text(), _services(standing)]
    if standing["replicas"]:
        parts += [Text(), _replicas(standing)]
    return Group(*parts, Text(), *_rest(standing))


def _headline(standing: Standing) -> RenderableType:
    state = standing["state"]
    text = Text(standing["run"], style="bold")
    text.append(f"   {state}", style=STYLES.get(state, "yellow"))
    text.append(f"   step {standing['step']} of {standing['steps']}", style="default")
    if standing["phase"] is not None:
        text.append(f"   phase {standing['phase'] + 1}")
    if standing["eta_s"] is not None:
        text.append(f"   eta {duration(standing['eta_s'])}")
    return text


def _bar(standing: Standing) -> RenderableType:
    done = round(BAR_WIDTH * min(1.0, standing["step"] / max(1, standing["steps"])))
    return Text.assemble(("━" * done, "green"), ("─" * (BAR_WIDTH - done), "dim"))


def _numbers(standing: Standing) -> RenderableType:
    named = {
        "loss": _number(standing["loss"], "{:.3f}"),
        "grad norm": _number(standing["grad_norm"], "{:.2f}"),
        "lr": _number(standing["lr"], "{:.2e}"),
        "tok/s": "-" if standing["tokens_per_s"] is None else thousands(standing["tokens_per_s"]),
        "s/step": _number(standing["seconds_per_step"], "{:.2f}"),
        "wait": _number(standing["teacher_wait_fraction"], "{:.0%}"),
    }
    return Text("  ".join(f"{name} {value}" for name, value in named.items()))


def _domains(standing: Standing) -> RenderableType:
    table = _table("domain", "weight", "KL", "KL first", "epochs", "loss tokens")
    for name, domain in standing["domains"].items():
        table.add_row(
            name,
            f"{domain['weight']:.3f}",
            _number(domain["kl"], "{:.3f}"),
            _number(domain["kl_first"], "{:.3f}"),
            _number(domain["epochs"], "{:.2f}"),
            f"{domain['tokens']:,}",
        )
    return table


def _services(standing: Standing) -> RenderableType:
    table = _table("teacher service", "serving", "wanted", "min", "max", "steps waited")
    for service in standing["services"]:
        low, high = service["min"], service["max"]
        table.add_row(
            service["name"],
            Text(
                str(service["present"]),
                style="green" if service["present"] >= service["wanted"] else "yellow",
            ),
            str(service["wanted"]),
            "fixed" if low is None else str(low),
            "fixed" if high is None else str(high),
            f"{service['waiting']:.0%}",
        )
    return table


def _replicas(standing: Standing) -> RenderableType:
    table = _table("teacher service", "replica", "state", "units", "tokens", "restarts")
    for replica in standing["replicas"]:
        table.add_row(
            replica["service"],
            replica["name"],
            Text(replica["state"], style="green" if replica["state"] == "alive" else "red"),
            f"{replica['units']:,}",
            f"{replica['tokens']:,}",
            str(replica["restarts"]),
        )
    return table


def _rest(standing: Standing) -> list[RenderableType]:
    """Lines in plain words: failures, the checkpoint, how old this is, and the folder."""
    failures = {name: n for name, n in standing["failures"].items() if n}
    told = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in failures.items())
    checkpoint, age_s = standing["checkpoint"], standing["line_age_s"]
    workers = standing["workers"]
    lines = [
        f"failures    {told or 'none'}",
        f"checkpoint  {'none yet' if checkpoint is None else f'step {checkpoint}'}",
    ]
    if workers is not None:
        lines.insert(0, f"workers     {workers['present']} of {workers['wanted']} train")
    if standing["state"] == "at work" and age_s is not None:
        stale = "; see its logs" if age_s > STALE_S else ""
        lines.append(f"last line   {duration(age_s)} ago{stale}")
    return [Text(line) for line in [*lines, f"folder      {standing['folder']}"]]


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=40)
    for name in numbers:
        table.add_column(name, justify="left" if name in ("replica", "state") else "right")
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
