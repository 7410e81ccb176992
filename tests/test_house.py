"""The house: which room may know which. Rooms are folders of `musota/`; arrows go one way."""

import ast
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent / "musota"
FLOORS = ["errors", "files", "plan", "data", "models", "training", "studies", "workbook"]
LEAF, ITS_READERS = "rules", {"training", "studies", "workbook"}
KEPT_OUT = {"matplotlib", "ipywidgets", "IPython", "click", "papermill"}


def imported(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names + [f"{node.module}.{alias.name}" for node in froms for alias in node.names]


def may(room: str, other: str) -> bool:
    if other == LEAF or room == LEAF:
        return room == other or room in ITS_READERS or other == "errors"
    return FLOORS.index(other) <= FLOORS.index(room)


def test_arrows_go_one_way_and_the_lower_rooms_know_no_front_end():
    offenders = []
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "musota" and not may(room, rest.split(".")[0]):
                offenders.append(f"{path.relative_to(HOUSE)} imports {name}")
            if package in KEPT_OUT and room != "workbook":
                offenders.append(f"{path.relative_to(HOUSE)} imports {name}")
    assert offenders == []
