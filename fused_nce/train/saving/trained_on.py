"""What a checkpoint knows of its data, and how data differ from it."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object

MAX_NAMED = 4


def facts(loader: Any, beside: dict[str, str]) -> dict[str, Any]:
    """Count, images a class, digest of names and labels in order, and rate of a loader; digests of the rest by name."""
    labels = loader.labels
    counts = labels[labels >= 0].bincount(minlength=len(loader.classes)).tolist()
    return {
        "count": int(loader.count),
        "classes": dict(zip(map(str, loader.classes), counts, strict=False)),
        "digest": getattr(loader, "digest", None),
        **({"rate": loader.rate} if hasattr(loader, "rate") else {}),
        "beside": beside,
        "seeded": getattr(loader, "seeded", None),
    }


def same(data: dict[str, Any], end: int) -> None:
    """All processes have the same data, or all stop: each would shuffle a set of its own, and end at its own update.

    Args:
        data: `facts`.
        end: the run's last update.

    Raises:
        ValueError: naming a process that differs.
    """
    for rank, (other, last) in enumerate(gather_object([(data, end)])):  # fault: data-of-processes
        changed = changes(other, data) + ([f"last update {last} -> {end}"] if last != end else [])
        if changed:
            raise ValueError(f"processes: differ in their data, {'; '.join(changed)} (process {rank} -> this one)")


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words; empty where nothing changed, or where an older checkpoint does not say."""
    if not saved:
        return []
    lines = [f"images {saved['count']} -> {now['count']}"] if saved["count"] != now["count"] else []
    if "rate" in saved and saved["rate"] != now.get("rate"):
        lines.append(f"Hz {saved['rate']} -> {now.get('rate')}")
    old, new = saved["classes"], now["classes"]
    for what, names in (("gone", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if names:
            lines.append(f"classes {what}: {_named(sorted(names))}")
    moved = [f"{name} {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    if moved:
        lines.append(f"images of classes: {_named(moved)}")
    if not lines and list(old) != list(new):
        lines.append("the order of the classes")
    if not lines and saved["digest"] and now["digest"] and saved["digest"] != now["digest"]:
        lines.append("names or labels of some images, with the same counts")
    before = saved.get("beside", {})  # older checkpoints do not say
    return lines + [name for name, digest in now["beside"].items() if before.get(name, digest) != digest]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
