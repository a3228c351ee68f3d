"""What each layer selected, wanted and missed, and the page and the picture that show it."""

import base64
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.evaluation.selections import selections
from dsa.masks import membership
from dsa.modeling import AttentionObserver
from stages import see
from stages.files import write_rows
from stages.see_figure import laid_out
from tests.conftest import ROOT, small_model

ENTRIES = 5


class Whole(AttentionObserver):
    """Attention of each query to all keys before it, from the same queries and keys: [R, T, S] a layer."""

    def __init__(self):
        self.p = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = q @ k.transpose(2, 3) * layer.scaling
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        self.p.append(logits.masked_fill(~causal, -torch.inf).softmax(-1).mean(1))


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_what_is_selected_wanted_and_missed_adds_up(ids, per_kv_head):
    model = from_dense(small_model(), topk=6, n_heads=4, head_dim=8, index_per_kv_head=per_kv_head)
    layers, logits = selections(model, ids[0].tolist(), ENTRIES)
    assert torch.equal(logits, model(ids[:1], use_cache=False).logits[0].float())
    whole = Whole()
    with torch.no_grad():
        model(ids[:1], observer=whole, use_cache=False)
    for layer, p in zip(layers, whole.p, strict=True):
        assert layer.indices.shape == (len(p), 40, 6) and len(p) == (2 if per_kv_head else 1)
        chosen = membership(layer.indices, 40)
        assert (chosen.sum(-1) == torch.arange(1, 41).clamp(max=6)).all()
        torch.testing.assert_close(layer.missed, (p * ~chosen).sum(-1))
        best = p.topk(ENTRIES)
        torch.testing.assert_close(layer.mass[:, ENTRIES:], best.values[:, ENTRIES:])
        assert torch.equal(layer.wanted[:, ENTRIES:].long(), best.indices[:, ENTRIES:])
        assert (layer.wanted[:, 0, 1:] == -1).all() and (layer.mass[:, 0, 1:] == 0).all()


def test_dense_attention_selects_nothing(ids):
    model = from_dense(small_model(), topk=6, n_heads=4, head_dim=8, attention_mode="dense")
    with pytest.raises(ValueError, match="attention_mode"):
        selections(model, ids[0].tolist(), ENTRIES)


SOURCE = "class Base:\n    pass\n\n\ndef area(width, height):\n    return width * height\n" * 3
ROW = {
    "instruction": "What is the signature of `area`?",
    "input": SOURCE,
    "output": "def area(width, height):",
    "history": [],
    "type_keyword": ["lookup", "signature"],
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A random model and held-out rows where the pipeline has them."""
    model = from_dense(small_model(vocab_size=4096), topk=8, n_heads=2, head_dim=8)
    model.save_pretrained(tmp_path / "models/dsa")
    AutoTokenizer.from_pretrained(ROOT / "data/base").save_pretrained(tmp_path / "models/dsa")
    long = ROW | {"input": SOURCE * 40}
    plain = ROW | {"type_keyword": ["continue"]}
    write_rows(tmp_path / "data/long/test.jsonl.gz", [plain, long, ROW | {"input": SOURCE[:40]}, ROW])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(page) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def unpacked(text: str, dtype) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_the_page_holds_what_the_model_selected(project):
    see.main()
    page = (project / "reports/see/page.html").read_text(encoding="utf-8")
    data = content(page)
    assert SOURCE in "".join(data["pieces"])  # the longest row with look-ups that fits
    assert "http" not in page and "src=" not in page
    model, tokenizer = see.load_model(project / "models/dsa"), AutoTokenizer.from_pretrained(project / "models/dsa")
    (row,) = see.examples(tokenizer, [ROW])
    layers, L = selections(model.eval(), row["input_ids"], see.ENTRIES)[0], len(row["input_ids"])
    bits = np.unpackbits(unpacked(data["selected"], np.uint8).reshape(3, L, -1), axis=-1)[..., :L]
    assert np.array_equal(bits, np.stack([membership(layer.indices[0], L) for layer in layers]))
    assert np.array_equal(unpacked(data["wanted"], "<i2").reshape(3, L, -1), np.stack([x.wanted[0] for x in layers]))
    for name in ("mass", "missed"):
        exact = np.stack([getattr(layer, name)[0] for layer in layers])
        assert np.abs((unpacked(data[name], np.uint8) / 255) ** 2 - exact.ravel()).max() < 1 / 255
    assert (project / "reports/see/source.png").stat().st_size > 10_000


def test_a_text_of_ones_own_changes_no_output_of_the_pipeline(project):
    (project / "text.py").write_text(f"{SOURCE}# </script><b>\n", encoding="utf-8")
    see.main("text.py")
    page = (project / "see/page.html").read_text(encoding="utf-8")
    assert "".join(content(page)["pieces"]).endswith("# </script><b>\n") and "</script><b>" not in page
    assert not (project / "reports").exists()
    with pytest.raises(SystemExit, match=r"^nowhere\.txt: not there$"):
        see.main("nowhere.txt")


# Clicks the 30th token, then the third layer, and leaves what the page then says in its title.
CLICK = """<script>setTimeout(() => {
  spans[30].click();
  document.querySelectorAll("input")[3].click();
  const coloured = spans.map((span, i) => span.style.background ? i : -1).filter(i => i >= 0);
  const names = spans.flatMap((span, i) => span.className.includes("missed") ? [i] : []);
  document.title = JSON.stringify([about.textContent, coloured, names, text.querySelector(".asking").textContent]);
}, 500)</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser here")
def test_a_click_shows_what_each_layer_selected(project):
    see.main()
    page = project / "reports/see/page.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", CLICK), encoding="utf-8")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={project / 'browser'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    about, coloured, missed, asking = json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    data = content(done.stdout)
    L, N = len(data["pieces"]), data["entries"]
    bits = np.unpackbits(unpacked(data["selected"], np.uint8).reshape(3, L, -1), axis=-1)[..., :L]
    selected = set(np.flatnonzero(bits[2, 30]).tolist())
    wanted = unpacked(data["wanted"], "<i2").reshape(3, L, N)[2, 30]
    mass = (unpacked(data["mass"], np.uint8).reshape(3, L, N)[2, 30] / 255) ** 2
    assert len(selected) == 8 and set(coloured) == selected
    assert set(missed) == {key for key, m in zip(wanted.tolist(), mass, strict=True) if m > 0.005} - selected
    assert asking == data["pieces"][30]
    assert about.startswith("Token 31 of ") and about.count("8 of 31 keys, missed ") == 3


def test_a_text_is_laid_out_in_lines_and_nothing_is_lost():
    pieces = ["ab", "c\n", "\tde", "fghi", "\n\n", "j"]
    placed, lines = laid_out(pieces, width=6)
    assert lines == 5 and len(placed) == len(pieces)
    assert placed[:4] == [[(0, 0, "ab")], [(0, 2, "c ")], [(1, 0, "    de")], [(2, 0, "fghi")]]
    assert placed[4:] == [[(2, 4, " "), (3, 0, " ")], [(4, 0, "j")]]
