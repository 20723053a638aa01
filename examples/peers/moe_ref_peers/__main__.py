"""``python -m moe_ref_peers``: the suite over all peers, and the findings.

It writes peers.json and peers.png, and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

from executors._compare import plot
from executors._files.whole import write_json
from moe_ref_peers.findings import reproduce_all
from moe_ref_peers.judged import judge
from moe_ref_peers.machine import machine, tell
from moe_ref_peers.page import picture, table
from moe_ref_peers.peers import PEERS


def main() -> None:
    """Runs it."""
    names = [own.name for own in PEERS]
    parser = argparse.ArgumentParser(prog="moe_ref_peers", description="the suite over all peers")
    parser.add_argument("--out", type=Path, default=Path("peers-results"), help="folder of the results")
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="PEER", help=", ".join(names))
    parser.add_argument("--profile", default="quick", choices=["quick", "dev", "ci", "nightly"], help="of Hypothesis")
    parser.add_argument("--findings", type=Path, help="folder of scripts that reproduce defects")
    parser.add_argument("--keep", action="store_true", help="keep results in the folder of peers that are not run")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "peers.json"
    before = json.loads(file.read_text(encoding="utf-8")) if asked.keep and file.exists() else {}
    results: dict[str, Any] = {
        "machine": machine(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "profile": asked.profile,
        "peers": dict(before.get("peers", {})),
        "findings": before.get("findings", {}),
    }
    for entry in PEERS:
        if entry.name in asked.only:
            tell(f"{entry.name}: begins")
            own = judge(entry, asked.profile, tell).plain()
            tell(f"{entry.name}: {own['unavailable'] or own['tests']} in {own['seconds']} s")
            found = results["peers"] | {entry.name: own}
            results["peers"] = {name: found[name] for name in names if name in found}
            write_json(file, results)  # what is there so far
    if asked.findings:
        results["findings"] = reproduce_all(asked.findings.glob("*.py"), tell)
    write_json(file, results)
    plot.save(picture(results), asked.out / "peers.png")
    print(table(results))


if __name__ == "__main__":
    main()
