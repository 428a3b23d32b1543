"""`lint`: everything that a chip will not like about a network, found before it is compiled.

Rules live in `rules_mapping` (RV1xx cannot be mapped, RV2xx mapped at a price), `rules_accuracy`
(RV3xx) and `rules_fit` (RV4xx); a code, once given, keeps its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranvier.deploy import rules_accuracy, rules_fit, rules_mapping
from ranvier.deploy.chip import LOIHI2, Chip, chip_of
from ranvier.deploy.rules import RULES, Context, Rule, Severity
from ranvier.export.graph import Graph
from ranvier.train.errors import RangeError, UnsupportedError, expect

FAMILIES = (rules_mapping, rules_accuracy, rules_fit)
LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
GROUPS = {"RV1": "Cannot be mapped", "RV2": "Mapped at a price", "RV3": "Costs accuracy",
          "RV4": "Does not fit"}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing found: the rule's code and severity, the node, why, a way out, the user's line."""

    code: str
    severity: Severity
    node: str
    message: str
    fix: str
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        name = f"'{self.node}' " if self.node else ""
        return f"{where}{self.code} {self.severity}: {name}{self.message}. Fix: {self.fix}"


def lint(
    graph: Graph, chip: Chip | str = LOIHI2, *, weight_bits: int = 8,
    select: Sequence[str] | None = None, ignore: Sequence[str] = (),
) -> list[Finding]:  # fmt: skip
    """All findings on a source graph, by code and then in the graph's order; [] where it is clean.

    select, ignore  codes or their beginnings, such as "RV3"; ignore wins
    Raises UnsupportedError for a lowered graph, RangeError for a code that no rule has.
    """
    expect(graph, Graph, "lint", "trace(net, sample) makes one of a module")
    if graph.spec != "source":
        raise UnsupportedError("lint: the graph is lowered; lint takes it as it was traced or read")
    context = Context(graph, chip_of(chip, "lint"), weight_bits)
    found = []
    for code in wanted(select, ignore):
        for node, message, fix in RULES[code].check(context):
            source = graph[node].source if node in graph.nodes else ""
            found.append(Finding(code, RULES[code].severity, node, message, fix, source))
    return found


def wanted(select: Sequence[str] | None, ignore: Sequence[str] = ()) -> list[str]:
    """The codes that are asked for, in order. Raises RangeError for one that begins no code."""
    for part in (*(select or ()), *ignore):
        if not any(code.startswith(part) for code in RULES):
            raise RangeError(
                f"lint: no rule's code begins with '{part}'; any of {', '.join(RULES)}"
            )
    return [
        code
        for code in sorted(RULES)
        if (select is None or code.startswith(tuple(select))) and not code.startswith(tuple(ignore))
    ]


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([asdict(f) for f in findings], indent=1)


def to_sarif(findings: Sequence[Finding], artifact: str = "") -> str:
    """The findings as SARIF 2.1.0, which code hosts show beside the lines.

    artifact  the file that was linted, where a finding has no line of its own
    """
    rules = [_sarif_rule(r) for r in sorted(RULES.values(), key=lambda r: r.code)]
    driver = {"name": "ranvier", "rules": rules}
    runs = [{"tool": {"driver": driver}, "results": [_result(f, artifact) for f in findings]}]
    return json.dumps({"version": "2.1.0", "$schema": SARIF, "runs": runs}, indent=1)


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.example},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
    }


def _result(finding: Finding, artifact: str) -> dict[str, Any]:
    path, _, line = finding.source.rpartition(":")
    if not line.isdigit():
        path, line = finding.source, ""
    place: dict[str, Any] = {
        "logicalLocations": [{"name": finding.node or "graph", "kind": "node"}]
    }
    if path or artifact:
        physical: dict[str, Any] = {"artifactLocation": {"uri": path or artifact}}
        if line:
            physical["region"] = {"startLine": int(line)}
        place["physicalLocation"] = physical
    return {
        "ruleId": finding.code,
        "level": LEVELS[finding.severity],
        "message": {"text": f"{finding.node}: {finding.message}. Fix: {finding.fix}"},
        "locations": [place],
    }


def codes_table() -> str:
    """All rules as a Markdown reference, group by group."""
    lines = []
    for prefix, title in GROUPS.items():
        lines += [f"## {prefix}xx: {title.lower()}", "", "| code | severity | what | for example |",
                  "|---|---|---|---|"]  # fmt: skip
        for code in sorted(c for c in RULES if c.startswith(prefix)):
            r = RULES[code]
            lines.append(f"| `{code}` | {r.severity} | {r.title} | {r.example} |")
        lines.append("")
    return "\n".join(lines)
