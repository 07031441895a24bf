"""Writes the table of docs/models.md: what loads, and how, from the list that the server itself goes by.

usage: python docs/generate.py
"""

from pathlib import Path

from rewardserve.models.families import table
from rewardserve.models.spec_keys import __doc__ as spec_file

PAGE = Path(__file__).with_name("models.md")
START, END = "<!-- made by docs/generate.py from here -->\n", "<!-- to here -->\n"


def made() -> str:
    described, _, keys = (spec_file or "").partition("\n\n")
    return f"\n{table()}\n## Others\n\n{described}\n\n```toml\n{keys.strip()}\n```\n\n"


def page(text: str) -> str:
    """`text` with what lies between the marks made anew."""
    before, _, rest = text.partition(START)
    return before + START + made() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
