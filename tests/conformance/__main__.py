"""Write the table of artefacts into docs/reliability.md: `python -m tests.conformance`."""

from tests.conformance.table import PAGE, with_table

PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
