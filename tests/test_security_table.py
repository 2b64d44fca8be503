"""Every row of docs/security.md names tests, and they exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "security.md").read_text()


def rows() -> list[list[str]]:
    """Cells of the tables' rows."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
    return [line for line in lines if not line[0].startswith("---")]


def test_every_threat_has_a_test_that_exists() -> None:
    threats = [row for row in rows() if "::" in row[-1] or len(row) != 3 or not row[0].startswith("`")]
    threats = [row for row in threats if row[-1] not in ("test", "of")]
    assert len(threats) > 25
    for row in threats:
        file = None
        names = re.findall(r"`((?:test_\w+\.py)?)::(test_\w+)`", row[-1])
        assert names, f"no test named: {row[0]}"
        for named, test in names:
            file = named or file
            assert file is not None, row
            assert re.search(rf"def {test}\(", (TESTS / file).read_text()), f"{file}::{test}"


def test_limits_are_those_of_the_code() -> None:
    from vllm_kvcompress.config import Limits

    told = {row[0].strip("`"): row[1].replace(",", "") for row in rows()}
    told = {name: value for name, value in told.items() if name in Limits.model_fields}
    assert told == {name: str(value) for name, value in Limits().model_dump().items()}
