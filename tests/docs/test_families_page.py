"""docs/families.md lists what is installed. Its digits depend on the machine, and are not compared."""

import re

import pytest

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import transformers

import families
import families_page
from family_sizes import OWN_LOOPS

TEXT = families_page.PAGE.read_text(encoding="utf-8")
(VERSION,) = re.findall(r"transformers\s(\d\S*),", TEXT)
WRITE = "run python tests/support/families_page.py"


@pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the page is about transformers {VERSION}")
def test_the_page_lists_the_installed_families() -> None:
    served, loops = families_page.listed(TEXT).values()
    assert sorted(served) == sorted((f.name, f.experts) for f in families.families()), WRITE
    assert loops == [(name, experts) for name, (experts, _, _) in OWN_LOOPS.items()], WRITE


def test_a_row_says_what_is_computed() -> None:
    assert "| gpt_oss | `GptOssExperts` | swiglu, alpha 1.702, limit 7, offset 1, interleaved |" in TEXT
    assert "| gemma4 | `Gemma4TextExperts` | geglu_tanh |" in TEXT
    assert "| nemotron_h | `NemotronHExperts` | relu2 |" in TEXT
    assert "| inkling2 | `Inkling2Experts` | swiglu, gate softcap 4, up softcap 25 |" in TEXT
    assert "| muse_spark | `MuseSparkExperts` | swiglu, output normalised, eps 1e-08 |" in TEXT


def test_the_page_reads_as_it_is_written() -> None:
    """The text around the tables is the generator's."""
    around = re.sub(r"^\|.*\n?", "", TEXT, flags=re.MULTILINE)
    for part in re.split(r"\{\w+\}", families_page.TEXT):
        assert part.strip() in around, WRITE
