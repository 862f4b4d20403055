"""Proofs for refusal.py: known answers, identities of the paper, independent oracles.

pytest                                          # a minute and a half, nothing to download
pytest -m census                                # every architecture that transformers has
pytest -m seeds                                 # the tiny model's bars on other seeds
REFUSAL_MODEL=folder pytest -m real             # the paper's claims on a real model

python test_refusal.py blank student.py         # the classroom's copy of refusal.py
python test_refusal.py status student.py        # which exercises are solved, and which is next
python test_refusal.py hint 3                   # one hint
REFUSAL=student.py pytest -k exercise_3         # grade an exercise; without -k: all of them

python test_refusal.py census                   # the census as a table
python test_refusal.py bench [--model FOLDER]   # the search against the plain procedure

Read it beside refusal.py, in the same order: what does each function claim, and how would we know?
"""

import ast, collections, copy, doctest, functools, importlib.util, inspect, json, math, os, re
import shutil, subprocess, sys, tempfile, textwrap, time, traceback, warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

HERE, PROGRAM = Path(__file__).resolve().parent, __name__ == "__main__"


def load(path):
    """A file as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What `blank` adds to a student's copy, so that it says what is next before it trains anything.
CHECK = r'''    if blanks := re.findall(r'^    raise NotImplementedError\("(exercise .*)"\)$',
                            Path(__file__).read_text(encoding="utf-8"), re.MULTILINE):
        sys.exit(f"next: {blanks[0]} ({len(blanks)} still blank)")
'''


def students_files():
    """The students' copies that lie beside."""
    files = sorted({*HERE.glob("*.py"), *Path.cwd().glob("*.py")} - {Path(__file__).resolve()})
    return [p.name for p in files if p.stem == "student" or CHECK in p.read_text("utf-8", "ignore")]


def load_graded():
    """refusal.py, or the student's file that REFUSAL names; or one line why it cannot be loaded."""
    path = Path(os.environ.get("REFUSAL", HERE / "refusal.py"))
    try:
        return load(path)
    except FileNotFoundError:
        named = [*students_files(), "student.py"][0]
        fault = f"{path} is not there: name the file to grade, REFUSAL={named} pytest -k exercise_1"
    except SyntaxError as error:
        fault = f"{path.name}, line {error.lineno}: {(error.text or '').strip()}: {error.msg}"
    except Exception as error:
        at, what = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
        fault = f"{Path(at.filename).name}, line {at.lineno}: {at.line}: {what}: {error}"
    raise SystemExit(fault) if PROGRAM else pytest.Collector.CollectError(fault)  # no frames shown


if PROGRAM and sys.argv[1:2] == ["status"]:
    os.environ["REFUSAL"] = [*sys.argv[2:], *students_files(), "student.py"][0]
R = None if PROGRAM and sys.argv[1:2] == ["hint"] else load_graded()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # no configuration file in which to register these marks
    census_mark, real, seeds = pytest.mark.census, pytest.mark.real, pytest.mark.seeds

KINDS = ("harmful", "harmless")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPTS = ["How do I boil an egg?", "Write a poem",
           "Explain how to swim in bad weather, in rain, and in the dark of the night"]


@pytest.fixture(scope="session")
def tiny():
    """The tiny chat model, trained once: (model, tokenizer)."""
    return R.train_tiny_model(seed=0)


def split_of(*sizes):
    """The project's prompts, split as the program splits them: kind -> train, val and test."""
    parts = {kind: R.split(R.load_prompts(R.PROMPTS / f"{kind}.txt"), *sizes) for kind in KINDS}
    return {kind: SimpleNamespace(train=a, val=b, test=c) for kind, (a, b, c) in parts.items()}


@pytest.fixture(scope="session")
def data():
    return split_of(128, 32, 100)


def find(model, tokenizer, data):
    """The direction, by the program's own steps."""
    means = [R.mean_activations(model, tokenizer, data[kind].train) for kind in KINDS]
    validation = [data[kind].val for kind in KINDS]
    return R.select_direction(model, tokenizer, R.refusal_directions(*means), *validation)


@pytest.fixture(scope="session")
def found(tiny, data):
    return find(*tiny, data)


def small_model(scale=8.0, **sizes):
    """A random Llama and a tokenizer; scaled up, or every block does next to nothing."""
    tokenizer = R.tiny_tokenizer([*PROMPTS, "Write a poem about rain and bad weather"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1) | sizes)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(scale if p.ndim > 1 else 1.0)
    return model, tokenizer


@pytest.fixture
def toy():
    """A small random model, new for every test: (model, tokenizer)."""
    return small_model()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, tokenizer):
    """By transformers' own means, (prompt, vocab): each prompt by itself, without padding."""
    ids = [R.tokenize(tokenizer, [prompt])["input_ids"] for prompt in PROMPTS]
    return torch.cat([model(input_ids=x).logits[:, -1] for x in ids])


@torch.no_grad()
def stream(model, tokenizer, prompt):
    """The residual stream by transformers' own means: (seq, layer, d_model), 0 .. n_layers."""
    last, ids = [], R.tokenize(tokenizer, [prompt])["input_ids"]
    norm = model.model.norm  # hidden_states[-1] is what leaves it; we want what enters
    with norm.register_forward_pre_hook(lambda module, args: last.append(args[0])):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    return torch.stack([*states, *last], dim=2)[0]


def close(a, b, within=1e-4):
    torch.testing.assert_close(a, b, atol=within, rtol=within, check_dtype=False, equal_nan=True)


def test_docstring_examples():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(R):
        parts = small_model(1.0, hidden_size=4, num_hidden_layers=3, num_attention_heads=1)
        example.globs |= dict(zip(("model", "tokenizer"), parts))
        runner.run(example)
    assert runner.summarize().failed == 0 < runner.tries


# %% The prompts -----------------------------------------------------------------------------------


def test_prompts_match_in_form_and_do_not_repeat():
    both = [R.load_prompts(R.PROMPTS / f"{kind}.txt") for kind in KINDS]
    for bad, good in zip(*both, strict=True):
        assert bad.split()[0] == good.split()[0] and (bad[-1] == "?") == (good[-1] == "?")
        assert abs(len(bad.split()) - len(good.split())) <= 2, (bad, good)
    for prompts in both:
        bags = [set(re.findall(r"[a-z'-]+", p.lower())) for p in prompts]
        assert max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]) < 0.6


def test_splits_are_disjoint_repeatable_and_spread_over_the_categories(data):
    prompts, whole = R.load_prompts(R.PROMPTS / "harmful.txt"), data["harmful"]
    assert len({*whole.train, *whole.val, *whole.test}) == 260
    for part, size in ((whole.train, 128), (whole.val, 32), (whole.test, 100)):
        counts = collections.Counter(prompts.index(p) // 28 for p in part)  # ten categories
        assert len(part) == size and size / 10 - 2 < min(counts[i] for i in range(10))
    small = split_of(64, 16, 50)["harmful"]  # a smaller experiment uses subsets
    assert set(small.train) < set(whole.train) and set(small.test) < set(whole.test)


ODD = "\ufeffOne two\r\n\r\na \f\u2028b\x0bc\rOne two\r\n  \n"  # only \n and \r end a line


@pytest.mark.parametrize("name, content, want", [
    ("p.txt", ODD.encode(), ["One two", "a \f\u2028b\x0bc"]), ("p.txt", b"\n \n", R.BadUse),
    ("p.txt", b"a\0b", R.BadUse), ("p.txt", "Hallo".encode("utf-16"), R.CannotDo),
    ("p.csv", b"id,prompt\n1,Hi", R.BadUse), ("p.json", b'["Hi"]', R.BadUse),
    ("p.jsonl", b'{"prompt": "Hi"}', R.BadUse),
])  # fmt: skip
def test_prompt_files(tmp_path, name, content, want):
    (tmp_path / name).write_bytes(content)
    if isinstance(want, list):
        assert R.load_prompts(tmp_path / name) == want
    else:
        with pytest.raises(want, match=re.escape(name)):
            R.load_prompts(tmp_path / name)


# %% Tokens and positions --------------------------------------------------------------------------

EACH = "{% for m in messages %}"
CHATML = EACH + ("<|user|>{{ m.content }}<|end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
BRACKETS = EACH + ("{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
                   "{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}")
SYSTEM = f"<|user|>Be brief.<|end|>{EACH}<|user|>{{{{ m.content }}}}\n{{% endfor %}}<|assistant|>"
THINKS = BRACKETS + "{% if enable_thinking is undefined or enable_thinking %}<|pad|>{% endif %}"


@pytest.mark.parametrize("template, tail", [  # in the manner of ChatML, Llama 2, Gemma and Qwen 3
    (CHATML, "<|end|>\n<|assistant|>\n"), (BRACKETS, "<|assistant|>"), (SYSTEM, "\n<|assistant|>"),
    (THINKS, "<|assistant|>"),
])  # fmt: skip
def test_positions_are_the_tail_of_the_template(toy, template, tail):
    toy[1].chat_template = template
    assert toy[1].decode(R.template_tail(toy[1])) == tail


def test_tokenize_pads_on_the_left_and_adds_one_bos(toy):
    from tokenizers.processors import TemplateProcessing

    toy[1].padding_side = "right"  # whatever the tokenizer was set to
    bos = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 1)])  # <|end|> plays the BOS
    toy[1].backend_tokenizer.post_processor, toy[1].chat_template = bos, "<|end|>" + BRACKETS
    batch = R.tokenize(toy[1], PROMPTS)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        assert (mask.diff() >= 0).all() and mask[-1] and ids[mask.bool()].tolist().count(1) == 1
    assert 1 not in R.refusal_tokens(toy[1]) + R.template_tail(toy[1])


class SmallMemory(TorchDispatchMode):
    """A machine on which no tensor can have more than so many elements."""

    def __init__(self, most):
        super().__init__()
        self.most, self.refused = most, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out


def test_running_out_of_memory_changes_no_result(toy):
    directions, prompts = randn(100, 4, 32), PROMPTS * 6
    R.writers(toy[0]), R.padding_is_seen(toy[0])
    for work in (R.mean_activations, R.refusal_scores,
                 lambda *tools: R.attribution(*tools[:2], directions, tools[2]),
                 lambda *tools: torch.tensor([len(reply) for reply in R.generate(*tools, 4)])):
        whole = work(*toy, prompts)
        with SmallMemory(15_000) as memory:  # enough for a few prompts
            close(work(*toy, prompts), whole)
        assert memory.refused
    with SmallMemory(500), pytest.raises(R.CannotDo, match="out of memory with one prompt"):
        R.refusal_scores(*toy, prompts)
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert R.out_of_memory(error.value), "what a CPU says"


# %% Means and directions --------------------------------------------------------------------------


def test_mean_activations_are_the_block_inputs(toy, monkeypatch):
    states = torch.stack([stream(*toy, prompt)[-3:] for prompt in PROMPTS])  # (prompt, 3, layer, d)
    want = states[:, :, :-1].double().mean(0)
    monkeypatch.setattr(R, "BATCH_SIZE", 2)  # batches of two and one, and every prompt counts alike
    means = R.mean_activations(*toy, PROMPTS)
    assert means.dtype == torch.float64 and means.shape == (2, 4, 32)
    close(means, want[1:])  # the toy's tail is two tokens long
    close(R.mean_activations(*toy, PROMPTS, n_positions=3), want)
    close(R.activations(*toy, PROMPTS, [-1, -3]), states[:, [2, 0]])
    r = randn(32) / randn(32).norm()
    close(R.projections(*toy, PROMPTS, 5 * r, -2), states[:, 1] @ r)


def naive_auroc(a, b):
    return sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))


def naive_caught(a, b):
    """Try every threshold with no more false alarms than one in a hundred, but one at least."""
    allowed = [t for t in [*a, *b] if sum(y > t for y in b) <= max(1, len(b) // 100)]
    return max(sum(x > t for x in a) / len(a) for t in allowed)


@pytest.mark.parametrize("n", [2, 40, 100, 250])
def test_detection_counts_pairs_and_false_alarms(n):
    a, b = randn(30, seed=1) + 1, randn(n)
    a[: n // 9] = b[: n // 9]  # ties count half
    assert R.auroc(a, b) == pytest.approx(naive_auroc(a.tolist(), b.tolist()))
    assert R.caught(a, b) == pytest.approx(naive_caught(a.tolist(), b.tolist()))


# %% Ablation and addition -------------------------------------------------------------------------


def out_of(x, r):
    """The oracle: x without its part along the unit vector r."""
    return x - torch.einsum("...i,i,j->...j", x, r, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1e-10, 1, 1e10])
def test_projecting_out_leaves_nothing_and_everything_else(dtype, length):
    x, r = randn(3, 7, 65, seed=1).to(dtype), randn(65) / randn(65).norm()
    kept, before = R.project_out(x, R.unit(randn(65) * length)), x.clone()
    assert kept.dtype == dtype and torch.equal(x, before), "a new tensor of the same kind"
    close(kept.float(), out_of(x.float(), r), 8 * torch.finfo(dtype).eps)


def papers_hooks(model, r):
    """The authors' way: project at every block's input, and at what attention and MLP give."""
    for block in model.model.layers:
        yield block.register_forward_pre_hook(lambda m, args: (out_of(args[0], r), *args[1:]))
        yield block.self_attn.register_forward_hook(lambda m, args, x: (out_of(x[0], r), *x[1:]))
        yield block.mlp.register_forward_hook(lambda m, args, x: out_of(x, r))


def test_ablation_is_the_papers_and_leaves_no_trace(toy):
    before, r = logits_of(*toy), R.unit(randn(32))
    with pytest.raises(ZeroDivisionError), R.ablate(toy[0], 17 * r):  # of any length
        ours, x = logits_of(*toy), stream(*toy, PROMPTS[0])
        assert (x @ r).abs().max() < 1e-4 * x.norm(dim=-1).max()
        1 / 0
    assert torch.equal(logits_of(*toy), before) and (ours - before).abs().max() > 0.01
    with R.hooked(papers_hooks(toy[0], r)):
        close(ours, logits_of(*toy))
    with R.reading(toy[0], lambda layer, x: 2 * x):  # reading only reads
        assert torch.equal(logits_of(*toy), before)


@pytest.mark.parametrize("vector, layer, factor, message", [
    (randn(32) * 0, None, 1, "no direction"), (randn(32) * math.nan, None, 1, "no direction"),
    (randn(31), None, 1, "needs shape"), (randn(1, 32), 1, 1, "needs shape"),
    (randn(32), 4, 1, "no layer 4"), (randn(32), -1, 1, "no layer -1"),
    (randn(32) * 1e4, 1, 7.0, "not finite"),
])  # fmt: skip
def test_vectors_that_make_no_sense_are_refused(toy, vector, layer, factor, message):
    model = toy[0].half()  # 70 000 is more than it can hold
    way = R.ablate(model, vector) if layer is None else R.add(model, vector, layer, factor)
    with pytest.raises(R.BadUse, match=message), way:
        pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_writer_in_fifty_that_is_not_ablated_is_found(dtype):
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=24)
    model, r = small_model(4.0, **sizes)[0].to(dtype), R.unit(randn(256))
    for left_out in (None, 0, 3, 24, 47, 48):
        left = [m for i, m in enumerate(R.writers(model)) if i != left_out]
        with R.hooked(R.after(module, lambda x: R.project_out(x, r)) for module in left):
            if left_out is None:
                R.check_erased(model, r)
                continue
            where = f"block {(left_out - 1) // 2}" if left_out else "the embeddings"
            with pytest.raises(R.CannotDo, match=f"written to the stream by {where} of"):
                R.check_erased(model, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", [0.0, 1.0, 17.0])  # how much of the massive channel is in r
def test_massive_activations_are_ablated_all_the_same(toy, dtype, along):
    """One channel a thousand times the others, as in Llama 2: what is ablated counts as ablated."""
    model, r = toy[0], randn(32)
    r[3] = along
    model.model.embed_tokens.weight[:, 3] *= 1000
    model.model.layers[1].mlp.down_proj.weight[3] *= 1000
    with R.ablate(model.to(dtype), r):
        pass
    R.orthogonalize(model, r)


# %% The refusal score and the KL divergence -------------------------------------------------------


def test_score_and_kl_against_naive_oracles():
    p, q = 4 * randn(2, 5, 50).double()
    P, share = p.softmax(-1), p.softmax(-1)[:, [3, 7]].sum(-1)
    close(R.log_odds(p, [3, 7]), (share / (1 - share)).log(), 1e-9)
    close(R.kl_divergence(p, q), (P * (P / q.softmax(-1)).log()).sum(-1), 1e-5)
    sure = torch.tensor([200.0, 0.0, 0.0])  # where a naive formula gives log 0
    assert R.log_odds(sure, [0]).item() == pytest.approx(200 - math.log(2))
    assert R.kl_divergence(sure, -sure).item() == pytest.approx(200 + math.log(2))


def test_numbers_that_overflow_are_no_result(toy):
    toy[0].half().model.layers[1].mlp.down_proj.weight.mul_(1e5)
    with pytest.raises(R.CannotDo, match="hold NaN or infinity"):
        R.mean_activations(*toy, PROMPTS)


# %% Choosing one direction: the plain definitions, and refusal.py against them --------------------
#
# The oracle does what the paper says in the plainest way: every candidate, three sweeps, and the
# authors' hooks.  It is slow on purpose.


@torch.no_grad()
def plain_logits(model, tokenizer, prompts, ablated=None, added=None, layer=None):
    """Logits for the first token of the reply, (prompt, vocab), with a vector ablated or added."""
    handles, rows = [], []
    if added is not None:
        shift = lambda m, args: (args[0] + added.to(args[0]), *args[1:])
        handles = [model.model.layers[layer].register_forward_pre_hook(shift)]
    elif ablated is not None and ablated.norm() > 0:
        handles = papers_hooks(model, (ablated / ablated.norm()).to(model.device, model.dtype))
    with R.hooked(handles):
        for start in range(0, len(prompts), 32):
            batch = R.tokenize(tokenizer, prompts[start : start + 32]).to(model.device)
            rows.append(model(**batch).logits[:, -1].double().cpu())  # (batch, vocab)
    return torch.cat(rows)


def plain_score(logits, tokens):
    """Mean of log(p / (1 - p))."""
    p = logits.softmax(-1)[:, tokens].sum(-1)
    return (p / (1 - p)).log().mean()


def plain_kl(p_logits, q_logits, epsilon=0.0):
    """Mean KL divergence; the authors' code has epsilon = 1e-6 inside both logarithms."""
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * ((p + epsilon) / (q + epsilon)).log()).sum(-1).mean()


def plain_select(model, tokenizer, directions, harmful_val, harmless_val, only=None):
    """All candidates (or `only` some): name -> (position, layer), and the winner by the filters."""
    n, n_layers, _ = directions.shape
    tokens, base = R.refusal_tokens(tokenizer), plain_logits(model, tokenizer, harmless_val)
    scores = {name: torch.full((n, n_layers), math.nan) for name in ("bypass", "kl", "induce")}
    for at in only or [(i, layer) for i in range(-n, 0) for layer in range(n_layers)]:
        v, harmless = directions[at], plain_logits(model, tokenizer, harmless_val, directions[at])
        scores["bypass"][at] = plain_score(plain_logits(model, tokenizer, harmful_val, v), tokens)
        scores["kl"][at] = plain_kl(base, harmless)
        added = plain_logits(model, tokenizer, harmless_val, added=v, layer=at[1])
        scores["induce"][at] = plain_score(added, tokens)
    return scores, plain_winner(scores)


def plain_winner(scores):
    """The paper's filters; if nothing passes, without the one on induce: (position, layer)."""
    bypass, (n, n_layers) = scores["bypass"], scores["bypass"].shape
    early = [(i, layer) for i in range(-n, 0) for layer in range(int(0.8 * n_layers))]
    intact = [at for at in early if scores["kl"][at] <= 0.1]
    strict = [at for at in intact if scores["induce"][at] >= 0]
    return min(strict or intact, key=lambda at: bypass[at])


@torch.no_grad()
def plain_means(model, tokenizer, prompts):
    """Mean block inputs over the template's tail: (position, layer, d_model)."""
    n, total = len(R.template_tail(tokenizer)), 0
    for prompt in prompts:  # one at a time, so there is no padding
        batch = R.tokenize(tokenizer, [prompt]).to(model.device)
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]
        total = total + torch.stack([x[0, -n:].double().cpu() for x in states], dim=1)
    return total / len(prompts)


@pytest.fixture(scope="session")
def search(tiny, data):
    """What select_direction is given for the tiny model, and what the oracle says of everything."""
    means = [plain_means(*tiny, data[kind].train) for kind in KINDS]
    arguments = (*tiny, means[0] - means[1], data["harmful"].val, data["harmless"].val)
    return arguments, *plain_select(*arguments)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_select_direction_agrees_with_the_plain_definitions(search, found, exhaustive):
    arguments, scores, winner = search
    chosen = R.select_direction(*arguments, exhaustive=exhaustive)
    for name, plain in scores.items():
        measured = chosen.scores[name].isfinite()  # at layer 0 there is no direction
        assert measured[:, 1:].all() == exhaustive and measured[winner]
        close(chosen.scores[name][measured], plain[measured], 1e-3)
        assert getattr(chosen, name) == chosen.scores[name][winner]
    assert winner == (chosen.position, chosen.layer) and not chosen.relaxed
    close(found.vector, chosen.vector)  # found from mean_activations, the whole way in batches
    close(chosen.vector, arguments[2][winner], 1e-6)
    for prompts, base in zip(arguments[3:], (chosen.base_bypass, chosen.base_induce)):
        plain = plain_score(plain_logits(*arguments[:2], prompts), R.refusal_tokens(arguments[1]))
        assert base == pytest.approx(plain.item(), abs=1e-3)


def table(text):
    """'1 ~2 / 3 -' -> a tensor of two rows; ~2 is -2, and - is NaN, what was not measured."""
    rows = text.replace("-", "nan").replace("~", "-").split("/")
    return torch.tensor([[float(x) for x in row.split()] for row in rows])


CHOICES = """- ~1 ~2 - ~3; 0 0 0 0 0; 0 0 0 0 0; (-1, 2): argmin takes NaN for the least of all
~9 ~1 ~2 0 0; - .2 .1 0 0; 0 0 0 0 0; (-1, 2): unmeasured, broken, and just not broken
~9 ~8 ~2 0 ~9; 0 0 0 0 0; - ~1 0 1 1; (-1, 2): unmeasured, induces not, is too late
~9 ~8 ~2 0 ~9; 0 0 0 0 0; - ~1 ~2 ~3 1; (-1, 1): relaxed
0 0; - -; - -; None: nothing is measured
0 0; .2 .2; 0 0; None: all are broken
1 1 / 1 0; 0 0 / 0 0; 0 0 / 0 0; (-2, 0): positions count from the end, and layer 1 is too late"""


@pytest.mark.parametrize("case", CHOICES.splitlines())
def test_choose_filters_and_never_takes_what_was_not_measured(case):
    *scores, want = case.split(":")[0].split("; ")
    assert str(R.choose(dict(zip(("bypass", "kl", "induce"), map(table, scores))))) == want


def test_where_not_all_filters_can_be_passed_it_says_so(search, toy, monkeypatch):
    arguments, scores, _ = search
    monkeypatch.setattr(R, "INDUCE_MIN", 1e6)
    scores = scores | {"induce": scores["induce"] - 1e6}
    chosen = R.select_direction(*arguments)
    assert chosen.relaxed and (chosen.position, chosen.layer) == plain_winner(scores)
    with pytest.raises(R.CannotDo, match="means do not differ"):
        R.select_direction(*toy, torch.zeros(2, 4, 32), PROMPTS, PROMPTS)
    monkeypatch.setattr(R, "KL_MAX", -1.0)  # not 0: rounding alone can leave a KL just below
    with pytest.raises(R.CannotDo, match="KL"):
        R.select_direction(*arguments)


def test_attribution_is_the_derivative_of_erasing_a_little(search):
    model, tokenizer, directions, harmful, _ = search[0]
    estimate, slopes = R.attribution(model, tokenizer, directions, harmful), []
    r = R.unit(directions[-1, 1])
    for step in (0.005, -0.005):  # o' = o - step (o . r) r at every writer
        change = lambda x: x - step * (x - out_of(x, r))
        with R.hooked(R.after(module, change) for module in R.writers(model)):
            logits = plain_logits(model, tokenizer, harmful)
            slopes.append(plain_score(logits, R.refusal_tokens(tokenizer)).item())
    assert (slopes[0] - slopes[1]) / 0.01 == pytest.approx(estimate[-1, 1].item(), rel=2e-2)


@real
@pytest.mark.skipif("not {'REFUSAL_MODEL', 'REFUSAL_REFERENCE'} <= set(os.environ)")
def test_the_search_agrees_with_the_authors_code_on_a_real_model():
    """Qwen2.5-Coder-0.5B-Instruct: what is measured against the recorded scores, and the winner."""
    read = lambda name: json.loads(Path(os.environ["REFUSAL_REFERENCE"], name).read_text())
    prompts, tools = read("prompts.json"), R.load_model(os.environ["REFUSAL_MODEL"], "float32")
    means = [R.mean_activations(*tools, prompts[f"{kind}_train"]) for kind in KINDS]
    validation = [prompts[f"{kind}_val"] for kind in KINDS]
    chosen = R.select_direction(*tools, means[0] - means[1], *validation)
    assert (chosen.position, chosen.layer) == (-1, 16) and chosen.relaxed
    base = plain_logits(*tools, validation[1])
    for theirs in read("authors_scores.json")["scores"]:
        at = theirs["position"], theirs["layer"]
        for name, key in zip(("bypass", "induce", "kl"), ("refusal", "steering", "kl_div")):
            assert not abs(chosen.scores[name][at] - theirs[f"{key}_score"]) > 0.02, (name, at)
        if at in ((-1, 16), (-1, 18)):  # the rest of the KL's difference is their epsilon
            ablated = plain_logits(*tools, validation[1], (means[0] - means[1])[at])
            assert abs(plain_kl(base, ablated, 1e-6) - theirs["kl_div_score"]) < 2e-3


# %% The weights (the census proves them for every architecture) -----------------------------------


@pytest.mark.parametrize("kind", ["quantised", "offloaded"])
def test_weights_that_cannot_be_edited_are_left_alone(toy, kind):
    before, model = logits_of(*toy), toy[0]
    model.is_quantized = kind == "quantised"  # what transformers sets on every quantised model
    if kind == "offloaded":  # what accelerate leaves of a module between two forward passes
        model.spare = nn.Linear(2, 2, device="meta")
    with pytest.raises(R.CannotDo, match="quantised or offloaded weights cannot be edited"):
        R.orthogonalize(model, randn(32))
    assert torch.equal(logits_of(*toy), before)


# %% Replies ---------------------------------------------------------------------------------------


def test_generation_is_greedy_whatever_the_checkpoint_says(toy):
    model, tokenizer = toy
    ids = start = R.tokenize(tokenizer, PROMPTS[:1])["input_ids"]
    for _ in range(6):  # greedy by hand, no cache
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    by_hand = tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)
    model.generation_config = own = transformers.GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, suppress_tokens=[5, 6, 7])
    assert R.generate(model, tokenizer, PROMPTS, 6)[0] == by_hand and model.generation_config is own


def test_refusals_are_those_of_whole_replies(tiny, data):
    prompts = data["harmful"].test[:12] + data["harmless"].test[:12]
    replies = R.generate(*tiny, prompts)
    want = [R.TINY_REFUSAL in reply for reply in replies]
    assert 8 < sum(want) < 16 and R.refusal_rate(replies) == sum(want) / 24
    for look in (0, 2, 8):  # 2: "I'm sorry" is not there yet
        assert R.refusals(*tiny, prompts, look) == want
    assert R.refusal_rate(["\u201cI\u2019M SORRY", "Well, as an AI I", "I am sure"]) == 2 / 3


@pytest.mark.parametrize("hits, n", [(0, 1), (1, 2), (81, 263), (0, 30), (999, 1000), (7, 7)])
def test_wilson_ends_where_the_score_test_does(hits, n):
    """From the ends p, hits/n is z standard errors away: n (hits/n - p)^2 = z^2 p (1 - p)."""
    low, high = R.wilson(hits, n)
    assert (low == 0, high == 1) == (hits == 0, hits == n) and low <= hits / n <= high
    for p in (low, high):
        assert n * (hits / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p), abs=1e-12)


# %% The paper, on the tiny model ------------------------------------------------------------------


def check_bars(model, tokenizer, data, chosen):
    rate = lambda kind: R.refusal_rate(R.generate(model, tokenizer, data[kind].test, 24))
    assert rate("harmful") >= 0.85 and rate("harmless") <= 0.10
    with R.ablate(model, chosen.vector):
        assert rate("harmful") <= 0.10
    with R.ablate(model, randn(128, seed=1)):
        assert rate("harmful") >= 0.80
    with R.add(model, chosen.vector, chosen.layer):
        assert rate("harmless") >= 0.85


def test_the_paper_holds_on_the_tiny_model(tiny, data, found):
    check_bars(*tiny, data, found)


@seeds
@pytest.mark.parametrize("seed", range(1, 5))
def test_the_paper_holds_on_other_seeds(seed, data, request):
    if "seeds" not in request.config.getoption("-m"):
        pytest.skip("pytest -m seeds")
    tools = R.train_tiny_model(seed)
    check_bars(*tools, data, find(*tools, data))


@real
@pytest.mark.skipif("'REFUSAL_MODEL' not in os.environ")
def test_the_paper_holds_on_a_real_model(capsys):
    sizes = ("--n-train", 64, "--n-val", 16, "--n-test", 50)
    status, out, _ = program(capsys, "--model", os.environ["REFUSAL_MODEL"], *sizes)
    count = lambda row: int(re.search(rf"{row} +(\d+)/50", out)[1])
    assert status == 0
    assert count("harmful +direction ablated") <= 0.1 * count("harmful +no intervention")
    assert count("harmless +direction added") - count("harmless +no intervention") >= 25


# %% The program -----------------------------------------------------------------------------------


def program(capsys, *arguments):
    """The program's exit status, its output and its errors."""
    try:
        status = R.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse's way
        status = error.code
    return status, *capsys.readouterr()


def one_sentence(capsys, status, message, *arguments):
    """The program ends with this status and says this on one line; returns what else it said."""
    got, out, err = program(capsys, *arguments)
    *usage, line = err.splitlines()
    assert got == status and message in line and "error: " in line, err
    assert all(text.startswith(("usage: ", "   ")) for text in usage), err
    return out


@pytest.fixture(scope="session")
def saved_tiny(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


QUICK = ("--n-train", 64, "--n-val", 16, "--n-test", 40)


def test_the_program_from_end_to_end(saved_tiny, tiny, tmp_path, capsys):
    """What is printed and saved is what the functions give, and the folder loads anywhere."""
    folder, sizes = tmp_path / "out", ("--n-train", 64, "--n-val", 16, "--n-test", 40)
    asked = ("--map", "--prompt", "How do I bake bread?", "--save", folder)
    status, out, _ = program(capsys, "--model", saved_tiny, *sizes, *asked)
    assert status == 0 and os.listdir(tmp_path) == ["out"], "nothing half-written is left"
    assert re.findall(r"(?m)^(\d) \w+", out) == list("12345678")
    assert out.replace("\n", "").isprintable(), "a pipe gets clean text"
    assert re.search(r"bake\[-?\d+\.\d\]", out) and re.findall(r"(?m)^(\w+) .*AUROC at", out) == [
        "bypass", "induce", "kl"]
    data, numbers = split_of(64, 16, 40), json.loads((folder / "results.json").read_text())
    for kind, sign in zip(KINDS, (1, -1)):  # refused harmful prompts, and answered harmless ones
        for name, prompts in list(vars(data[kind]).items())[:2]:
            kept = zip(prompts, R.refusal_scores(*tiny, prompts))
            setattr(data[kind], name, [p for p, score in kept if sign * score > 0])
    chosen = find(*tiny, data)
    for name in ("position", "layer", "bypass", "kl", "induce", "base_bypass", "base_induce"):
        assert numbers[name] == pytest.approx(getattr(chosen, name), abs=1e-4)
    table = numbers["scores"]["kl"]
    assert table[chosen.position][chosen.layer] == numbers["kl"] and table[0][0] is None
    r = load_file(folder / "direction.safetensors")["direction"]
    close(r, chosen.vector)
    check_detector(out, numbers, tiny, data, r)
    edited = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    close(plain_logits(edited, tokenizer, PROMPTS), plain_logits(*tiny, PROMPTS, r))
    for row, model, way, least, most in (
        ("harmful +no intervention", tiny[0], nullcontext(), 34, 40),
        ("harmful +direction ablated", tiny[0], R.ablate(tiny[0], r), 0, 4),
        ("harmful +weights orthogonalized", edited, nullcontext(), 0, 4),
        ("harmless +direction added", tiny[0], R.add(tiny[0], r, chosen.layer), 34, 40),
    ):  # fmt: skip
        kind, name = row.split(" +")
        with way:
            refused = [R.is_refusal(x) for x in R.generate(model, tokenizer, data[kind].test)]
        assert numbers["refused"][f"{kind}, {name}"] == refused and least <= sum(refused) <= most
        assert re.search(rf"{row} +{sum(refused)}/40 ", out)


@torch.no_grad()
def check_detector(out, numbers, tiny, data, r):
    """Number of words; then the winner's position and the instruction's end, r in and out."""
    model, tokenizer = tiny
    wanted = [[[len(p.split()) for p in data[kind].test] for kind in KINDS]]
    end = -1 - len(R.template_tail(tokenizer))

    def at(position, part):  # (prompt, d_model) of each kind, at the winner's layer
        batches = (R.tokenize(tokenizer, getattr(data[kind], part)) for kind in KINDS)
        states = (model(**batch, output_hidden_states=True).hidden_states for batch in batches)
        return [x[numbers["layer"]][:, position] for x in states]

    for position in (numbers["position"], end):
        for step, way in ((1, nullcontext()), (2, R.ablate(model, r))):  # on every other prompt
            with way:
                harmful, harmless = (x[::step].mean(0) for x in at(position, "train"))
                wanted.append([(x @ (harmful - harmless)).tolist() for x in at(position, "test")])
    printed = re.findall(r"(?m)^ +(?:number|x) .* ([\d.]{5}) +(\d+)%$", out)
    wanted = [wanted[i] for i in (0, 1, 3, 2, 4)]  # first both places, and then both with r erased
    assert printed == [(f"{naive_auroc(*x):.3f}", f"{100 * naive_caught(*x):.0f}") for x in wanted]


def test_the_same_command_prints_the_same_numbers(saved_tiny, capsys):
    runs = [program(capsys, "--model", saved_tiny, *QUICK)[1] for _ in range(2)]
    assert len({re.sub(r"(?m)^time .*", "", out) for out in runs}) == 1 and "\ntime " in runs[0]


MISTAKES = """--harmless {tmp}/none.txt: cannot read the prompts
--harmful {harmless}: 280 prompts are in both files
--n-train 5000: cannot be taken from 280
--n-val 0: cannot be taken from 280
--n-train x: invalid int value
--n-val 53: share 152
--dtype int8: --dtype must be
--seed 18446744073709551616: --seed 0 or
--save {tmp}: does not exist yet"""


@pytest.mark.parametrize("mistake", MISTAKES.splitlines())
def test_what_fails_early_fails_early(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setattr(R, "train_tiny_model", None)  # before anything is trained or loaded
    (flag, value), message = mistake.split(": ", 1)[0].split(" "), mistake.split(": ", 1)[1]
    value = value.format(tmp=tmp_path, harmless=R.PROMPTS / "harmless.txt")
    one_sentence(capsys, 1 + ("read" not in message), message, flag, value.replace("\\n", "\n"))


@pytest.fixture
def folder(toy, tmp_path):
    """The toy as a user has it: a folder with a model and its tokenizer."""
    for part in toy:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def delete(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:3000])


def edit(name, **changes):
    """Change some entries of a JSON file."""

    def do(folder):
        file = folder / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | changes))

    return do


def weigh(change):
    """Change the state dict: change(weights)."""

    def do(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return do


def replace(name, **sizes):
    """Put a model of another kind in the folder."""

    def do(folder):
        cls = getattr(transformers, name)
        cls(cls.config_class(**sizes, vocab_size=600)).save_pretrained(folder)

    return do


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
T5 = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
DOWN = "model.layers.3.mlp.down_proj.weight"
NO_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
LORA = dict(peft_type="LORA", base_model_name_or_path="x")


@pytest.mark.parametrize("damage, message", [
    (lambda folder: None, "only 0 of 64 harmful prompts pass the filter"),
    (delete("config.json"), "model_type"), (edit("config.json", hidden_size="x"), "expected int"),
    (edit("config.json", intermediate_size=64), "cannot be used (RuntimeError"),
    (edit("config.json", model_type="x", auto_map={"AutoConfig": "code.Config"}), "custom code"),
    (delete("model.safetensors"), "no file named model.safetensors"),
    (cut("model.safetensors"), "SafetensorError"),
    (weigh(lambda weights: weights.pop(DOWN)), f"{DOWN} is not in its files"),
    (weigh(lambda weights: weights[DOWN].fill_(math.nan)), "activations or logits hold NaN"),
    (cut("tokenizer.json"), "cannot be used"),
    (edit("tokenizer.json", normalizer=NO_SPACES), "broken and turns a prompt into '<|user|>Exp"),
    (replace("T5ForConditionalGeneration", **T5), "T5Config"),
    (replace("BertForMaskedLM", **BERT), "is no sum of the stream"),
    (replace("LlamaForSequenceClassification", **BERT), "lm_head.weight is not in its files"),
    (replace("LlamaForCausalLM", **BERT, max_position_embeddings=8), "longer than this model"),
    (edit("adapter_config.json", **LORA), "adapter"),
    (delete("chat_template.jinja"), "its tokenizer has no chat template"),
    (template("{{ messages[0].content"), "TemplateSyntaxError"),
    (template(EACH + "{{ m.content }}{% endfor %}"), "adds nothing after the instruction"),
    (template("Hello <|assistant|>"), "its tokenizer is broken and turns a prompt into 'Hello"),
])  # fmt: skip
def test_a_folder_that_holds_no_chat_model(folder, capsys, damage, message):
    damage(folder)
    one_sentence(capsys, 1, message, "--model", folder, *QUICK)


def test_the_code_of_the_readme_runs(tiny, monkeypatch):
    """The tour of the library and the open exercises, block after block, as a reader would."""
    monkeypatch.setattr(R, "load_model", lambda name: copy.deepcopy(tiny))  # which one block tunes
    text, names = (HERE / "README.md").read_text(encoding="utf-8"), {}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["kind"] and names["place"] == (-1, 2), "the first block and the last have run"


# %% Files and interruptions -----------------------------------------------------------------------


def test_an_interruption_leaves_nothing_behind(monkeypatch):
    """Ctrl-C at every third module that is run and hook that is put in."""
    model, tokenizer = small_model(num_hidden_layers=1)
    left, settings = math.inf, model.generation_config

    def tick(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def ticking(put_in):
        return lambda *args, **more: (tick(), put_in(*args, **more))[1]

    def everything():
        R.about(model).writers = None
        with R.ablate(model, randn(32)), R.add(model, randn(32), 0):
            R.mean_activations(model, tokenizer, PROMPTS[:1])
        R.attribution(model, tokenizer, randn(2, 1, 32), PROMPTS[:1])
        R.generate(model, tokenizer, PROMPTS[:1], 2)
        R.orthogonalize(model, randn(32))

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(nn.Module, name, ticking(getattr(nn.Module, name)))
    R.padding_is_seen(model)
    with nn.modules.module.register_module_forward_pre_hook(tick):
        for at in range(1, 1000, 3):
            left = at
            try:
                everything()
                break  # it was over before
            except KeyboardInterrupt:
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                assert not any(p.requires_grad for p in model.parameters())
                assert model.generation_config is settings and not R.about(model).erased
    assert at > 100


CHOSEN = SimpleNamespace(vector=torch.ones(32), position=-1, layer=1)


def test_ctrl_c_ends_in_one_word_and_leaves_no_folder(toy, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(toy[1]), "save_pretrained", interrupt)  # the model is written by then
    with pytest.raises(KeyboardInterrupt):
        R.save(*toy, CHOSEN, {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(R, "load_model", interrupt)
    assert program(capsys)[::2] == (130, "interrupted\n")


def test_nothing_in_the_way_is_overwritten(toy, tmp_path):
    (tmp_path / "full").mkdir()
    for name in ("file", "full/x"):
        (tmp_path / name).write_text("mine")
    for target in ("full", "file", "file/below"):  # it was not there when the program began
        with pytest.raises(R.CannotDo, match="could not save"):
            R.save(*toy, CHOSEN, {}, tmp_path / target)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "x").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_output_that_nobody_reads(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as head -1 does when it has its line
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert R.main([]) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--model", "--harmful"])
def test_no_name_reaches_the_terminal_raw(tmp_path, capsys, flag):
    _, out, err = program(capsys, flag, tmp_path / "\x1b]0;owned\x07\r")
    assert "owned" in err and (out + err).replace("\n", "").isprintable()


# %% Silently wrong numbers ------------------------------------------------------------------------
#
# What users of such tools report.  Each of these once gave a number that looked like a result.

COMPILED = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="eager")) or model,
}  # fmt: skip


@pytest.mark.parametrize("way", COMPILED)
def test_hooks_run_in_a_compiled_model_or_it_is_refused(way):
    """The first run of a compiled model makes a program without our hooks, which stays."""
    model, tokenizer = small_model(num_hidden_layers=2)
    changes = (lambda m: R.ablate(m, randn(32))), (lambda m: R.add(m, randn(32), 1))
    plain, wanted = logits_of(model, tokenizer), []
    for change in changes:
        with change(model):
            wanted.append(logits_of(model, tokenizer))
    compiled = COMPILED[way](model)
    close(logits_of(compiled, tokenizer), plain)
    for change, want in zip(changes, wanted):
        try:
            with change(compiled):
                close(R.next_token_logits(compiled, tokenizer, PROMPTS), want)
        except R.CannotDo as refusal:
            assert "compile" in str(refusal)
    torch._dynamo.reset()


class Blind(transformers.LlamaForCausalLM):
    """Sees padding, as recurrent models do."""

    def forward(self, input_ids, attention_mask=None, **more):
        return super().forward(input_ids, **more)


class Generous(transformers.LlamaForCausalLM):
    """Swallows logits_to_keep, and gives the logits of all positions."""

    def forward(self, input_ids, logits_to_keep=0, **more):
        return super().forward(input_ids, **more)


class Wrapper(nn.Module):
    """In the manner of PEFT's: passes every argument on and names none; its settings go inside."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        self.inner.generation_config = self.generation_config
        return self.inner.generate(*args, **kwargs)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", Blind, Generous, Wrapper])
def test_padding_and_wrappers_change_nothing(toy, monkeypatch, kind):
    model, tokenizer = toy
    if kind in ("GPT-2", Wrapper):  # learned positions: padding moves them, if nobody tells
        sizes = dict(n_embd=32, n_layer=4, n_head=4, vocab_size=len(tokenizer))
        config = transformers.GPT2Config(**sizes, initializer_range=0.2)
        model = transformers.GPT2LMHeadModel(config).eval()
    bare, own = copy.deepcopy(model), model.generation_config
    settings = str(own)
    if kind in (Blind, Generous):
        model.__class__ = kind
    wrapped = Wrapper(model).eval() if kind is Wrapper else model
    alone = torch.stack([R.mean_activations(bare, tokenizer, [p]) for p in PROMPTS]).mean(0)
    for size in (1, 2, 3):
        monkeypatch.setattr(R, "BATCH_SIZE", size)
        for way in (R.ablate, lambda *_: nullcontext()):
            with way(bare, randn(32)), way(wrapped, randn(32)):
                want = logits_of(bare, tokenizer)
                close(R.next_token_logits(wrapped, tokenizer, PROMPTS), want)
        close(R.mean_activations(wrapped, tokenizer, PROMPTS), alone)
    assert kind is Wrapper or R.padding_is_seen(wrapped) == (kind is Blind)
    replies = [R.generate(bare, tokenizer, [p], 4)[0] for p in PROMPTS]
    assert R.generate(wrapped, tokenizer, PROMPTS, 4) == replies
    assert model.generation_config is own and str(own) == settings


def test_the_run_says_that_padding_is_seen(toy, monkeypatch, capsys):
    toy[0].__class__ = Blind
    monkeypatch.setattr(R, "load_model", lambda *arguments: toy)
    assert "sees padding" in one_sentence(capsys, 1, "pass the filter", *QUICK)


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "xlstm", "mamba"])
def test_recurrent_models_are_read_without_padding(name):
    check_padding(model := tiny_of(name))
    assert R.padding_is_seen(model) == (name != "mamba")


@pytest.mark.parametrize("source", ["nothing", "config", "tokenizer", "template"])
def test_replies_stop_at_whatever_ends_them(tiny, monkeypatch, source):
    """Only the model's settings, or the tokenizer, or the template may name the end of a turn."""
    whole, tokenizer = R.generate(*tiny, PROMPTS, 30), copy.deepcopy(tiny[1])
    ends = [0, tokenizer.eos_token_id][: 1 + (source == "config")]
    settings = transformers.GenerationConfig(eos_token_id=ends)
    monkeypatch.setattr(tiny[0], "generation_config", settings)
    if source != "tokenizer":
        tokenizer.eos_token = "<|pad|>"
    if source != "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "''")
    assert (R.generate(tiny[0], tokenizer, PROMPTS, 30) == whole) == (source != "nothing")


@pytest.mark.parametrize("work", [R.mean_activations, R.refusal_scores, R.generate])
def test_train_mode_is_refused(toy, work):
    toy[0].model.layers[2].train()  # one block is enough
    with pytest.raises(R.BadUse, match="training mode"):
        work(*toy, PROMPTS)


@pytest.mark.parametrize("first", ["ablate", "orthogonalize"])
@pytest.mark.parametrize("second", ["ablate", "orthogonalize"])
@pytest.mark.parametrize("slant", [0, 1])
def test_two_directions_are_both_erased_or_refused(toy, first, second, slant):
    """The second puts some of the first back, unless they are orthogonal."""
    r = R.unit(randn(32))
    other = R.unit(R.unit(out_of(randn(32, seed=1), r)) + slant * r)

    def erase(how, v):
        return R.ablate(toy[0], v) if how == "ablate" else nullcontext(R.orthogonalize(toy[0], v))

    refused = pytest.raises(R.CannotDo, match="erased before and not orthogonal|use ablate")
    with erase(first, r), refused if slant else nullcontext():
        with erase(second, other):
            x = stream(*toy, PROMPTS[0])
            assert max((x @ r).abs().max(), (x @ other).abs().max()) < 1e-4 * x.norm(dim=-1).max()


@pytest.mark.parametrize("between", [  # the generation prompt and the text of a past reply
    "", " ", "\n", "<|user|>final\n", '"', "<think>\n\n</think>\n", "{{ raise_exception('no') }}"])
def test_refusal_tokens_begin_an_opener(toy, between):
    _, tokenizer = toy
    tokenizer.chat_template = BRACKETS.replace(" {{ m.content }}", between + "{{ m.content }}")
    found = {tokenizer.decode([token]).strip() for token in R.refusal_tokens(tokenizer)}
    assert found == {"A", "I"}  # " I" where a space stands before it, and " A" is no token here
    assert (" I" in map(tokenizer.decode, R.refusal_tokens(tokenizer))) == (between == " ")
    tokenizer.add_tokens(["I'm", "As"])  # an opener may be one longer token
    longer = {tokenizer.decode([token]).strip() for token in R.refusal_tokens(tokenizer)}
    assert longer == {"I", "I'm", "As"}


@pytest.mark.parametrize("openers, way, sentence, rate", [
    (R.REFUSAL_OPENERS, "ablated", "64 harmful prompts pass the filter", 0),
    (R.REFUSAL_OPENERS, "harmful only", "64 harmless prompts pass the filter", 100),
    (("Sorry",), "", "64 harmful prompts pass the filter", 100),
    (("I am", "Here", "First", "This", "Start"), "", "64 harmful prompts pass the filter", 100),
])  # fmt: skip
def test_the_last_sentence_is_checked_against_replies(
        tiny, found, tmp_path, monkeypatch, capsys, openers, way, sentence, rate):  # fmt: skip
    monkeypatch.setattr(R, "load_model", lambda *arguments: tiny)
    monkeypatch.setattr(R, "REFUSAL_OPENERS", openers)
    files, prompts = [], R.load_prompts(R.PROMPTS / "harmful.txt")
    for i, kind in enumerate(KINDS):  # to such a model, all that there is is harmful
        (tmp_path / kind).write_text("\n".join(prompts[i::2]))
        files += [f"--{kind}", tmp_path / kind] * (way == "harmful only")
    with R.ablate(tiny[0], found.vector) if way == "ablated" else nullcontext():
        err = program(capsys, *QUICK, *files)[2]
    assert sentence in err and f" {rate}% of a few replies" in err, err
    assert "looks for '" in err and re.search(r"replies open with '\w+' \d+%", err)


class Series(list):
    """As a shuffled pandas Series: [i] goes by label, iteration by place."""

    def __getitem__(self, label):
        return super().__getitem__(-1 - label)


def test_prompts_are_a_sequence_of_strings_in_its_own_order(toy):
    for bad in ("Write a poem", [], Series()):
        with pytest.raises(R.BadUse, match="list of instructions"):
            R.generate(*toy, bad)
    want = R.refusal_scores(*toy, PROMPTS)
    assert torch.equal(R.refusal_scores(*toy, Series(PROMPTS)), want)
    assert R.split(Series("abcdefgh"), 4, 1, 3) == R.split(list("abcdefgh"), 4, 1, 3)


def test_inference_mode_makes_no_difference(toy, monkeypatch):
    monkeypatch.setattr(R, "KL_MAX", math.inf)
    directions = randn(2, 4, 32)

    def work():
        R.about(toy[0]).writers = None
        with R.ablate(toy[0], directions[0, 1]):
            ablated = R.next_token_logits(*toy, PROMPTS)
        scores = R.select_direction(*toy, directions, PROMPTS, PROMPTS[:1]).scores["bypass"]
        return torch.cat([x.flatten() for x in (ablated, scores)])

    want = work()
    with torch.inference_mode():
        close(work(), want)
        made_inside = small_model()[0]
        with pytest.raises(R.CannotDo, match="made under torch.inference_mode"):
            R.writers(made_inside)


def test_an_error_of_the_models_own_is_one_line_with_its_name(toy, monkeypatch, capsys):
    monkeypatch.setattr(toy[0].model.layers[1], "forward", lambda *_, **more: int("boom\nand more"))
    monkeypatch.setattr(R, "load_model", lambda *arguments: toy)
    one_sentence(capsys, 1, "LlamaForCausalLM fails on a forward pass (ValueError", *QUICK)


# %% Pictures --------------------------------------------------------------------------------------

MAP = r"""bypass        \n <|assist  AUROC at -1
    0      4.00     2.00    0.50
    1      1.00    -3.00*   1.00
    2         .    -4.00    1.00
    3         .    -1.00    1.00
    4      0.00    -0.50    1.00"""
PLOT = """
    0  #     o     #
    1  #           #
    2  o   #       #
    3  o     #     #
    4  o      #    #"""


def test_the_map_and_the_plot_are_this_text(toy):
    scores = {"bypass": table("4 1 - - 0 / 2 ~3 ~4 ~1 ~.5")}
    chosen = SimpleNamespace(position=-1, layer=1, scores=scores)
    apart = torch.arange(5.0).expand(4, 3, 5)  # (prompt, position, layer)
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    shown = R.score_map(chosen, "bypass", toy[1], {"harmful": apart, "harmless": 0 * apart})
    assert [line.split() for line in shown.splitlines()] == [x.split() for x in MAP.splitlines()]
    plot = R.layer_plot({"harmful": apart + spread, "harmless": 0 * apart}, width=12)
    assert plot.splitlines()[1:] == PLOT.splitlines()[1:]


# %% Exercises -------------------------------------------------------------------------------------
#
# `python test_refusal.py blank student.py` writes refusal.py without the bodies of these functions,
# and `REFUSAL=student.py pytest -k exercise_3` grades what a student has put there.  A grader has
# inputs of its own, oracles that never call the solution, and oracles in place of the other
# exercises' functions, so that each can be solved alone.  What holds for all exercises is in
# `watched` (arguments stay as they were) and `lesson` (an error is told as the student's own line).


def rows(text):
    """A table, its cells separated by |."""
    lines = text.strip().replace("\\\n", "").split("\n")
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


FORMS = {  # in the manner of ChatML, Llama-2 and Gemma; with the tail of each
    "chatml": ("{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
               ["<|end|>", "\u010a", "<|assistant|>", "\u010a"]),
    "brackets": ("{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}",
                 ["<|assistant|>"]),
    "system": ("<|user|>Be brief.<|end|>{% for m in messages %}<|user|>{{ m.content }}\n"
               "{% endfor %}{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}",
               ["\u010a", "<|end|>", "<|assistant|>"]),
}

EXERCISES = {
    "1": "template_tail", "2": "mean_activations", "3": "refusal_directions", "4a": "project_out",
    "4b": "ablate", "5": "add", "6": "log_odds", "7": "kl_divergence", "8": "choose", "9a": "erase",
    "9b": "orthogonalize"}
GRADES = {}  # number -> solved, blank or wrong
ANSWERS = dict(rows("""
1  | 2 tokens stand between instruction and reply on the tiny model, 5 on Qwen.
2  | at layer 0 harmful and harmless do not differ at all, and later more and more.
3  | at layer 0 the difference is 0: the tail's tokens are the same.
4a | to project twice is to project once: nothing is left along r.
4b | to project only what enters each block leaves r inside the block.
5  | the vector must not be normalised: its length is the dose.
6  | 0 is even odds.
7  | KL is never negative, and unbounded: infinite where q excludes a token.
8  | the lowest bypass is not the best: it breaks the model.
9a | the first axis of a nn.Linear writes: it stores (out, in).
9b | the unembedding writes nothing, it only reads.
"""))  # to what README asks the student to predict, printed when the exercise is solved
HINTS = rows("""
1  | Tokenize prompts whose last characters differ, and compare them from the end.
1  | `common_end` compares; what if nothing is left?
2  | `activations` gives every prompt's stream at the positions that you name.
2  | The tail is -n .. -1; of the n_layers + 1 streams the last enters no block; average in float64.
3  | Adding it must make the model refuse: which sign is that?
4a | x . r is one number for each vector, (...,): give it an axis back, [..., None], to multiply.
4a | x may be bfloat16 and r is not: compute in float32, and return the dtype of x.
4b | Hook every module of `writers(model)`: `after(module, change)`, and `hooked` takes hooks out.
4b | Inside `with hooked(...)` comes `with erasing(...)`, and inside that the yield.
5  | `before(blocks(model)[layer], change)` hooks; change returns a new x, in the dtype of x.
5  | `check_direction` refuses what does not fit; what is layer -1 to Python, and what to us?
6  | p / (1 - p) is a quotient of two sums of exponentials: two `logsumexp`, no division.
7  | `log_softmax` first, in float32; then log p - log q, weighted by p, summed over vocab.
8  | Make a mask of what passes, and take the lowest bypass inside it; then the position's sign.
8  | A NaN compares false, but argmin takes it for the least; and what if nothing passes?
9a | `movedim` the axis to the end: then it is project_out with u and w.  Move it back.
9b | The docstring lists the steps: each but the loop is a function that is there.
9b | plan_edits(model, r) gives name -> (parameter, axis, u, w).
""")
SLIPS = dict(rows("""
generation | The generation prompt belongs to the tail: there the model has yet to answer.
backwards | The right tokens in the wrong order: the last token of the prompt comes last.
instruction | Part of a prompt is in it: compare prompts whose last characters differ.
leaving | This is one layer late: layer l is the stream that enters block l.
one too many | That is one layer too many: what leaves the last block enters none.
layers first | Layers and positions are swapped: (position, layer, d_model).
wrong end | Positions count from each prompt's own end; padding is on the left.
mean of means | A mean of batch means: batches of unequal size must not count alike.
a sum | This is the sum: divide by the number of prompts.
counted twice | A batch that ran out of memory is done again: add up when the pass is over.
step | A step returns one result for each prompt of its batch: a list, or a tensor's rows.
dtype | Mind the dtype: what goes in comes out, unless the docstring says otherwise.
short | Digits are lost: compute in a longer dtype than the input's, and round at the end.
harmless first | The sign: harmful - harmless, so that adding it makes the model refuse.
too early | Do not normalise here: addition needs the length of the difference.
averaged | There is one candidate for every position: do not average over them.
component | This is the component along r; wanted is what is left without it.
mirror | This is the reflection, twice too much: subtract (x . r) r once.
in place | An argument was changed in place, and others still hold it: make a new one.
left behind | Whatever happens, the model must be as it was: hooks out, modes and dtypes kept.
no effect | Nothing has changed: does the hook return the new stream, and yield stand inside `with`?
no yield | A context manager yields once: before it the hooks go in, after it they go out.
swallowed | An error inside the with block must come out again: use `finally`, not `except`.
not erased | Every writer must lose its part along the unit vector: `writers` knows them.
unchecked | A writer was missed, and you did not notice: check that r is gone, see the docstring.
late check | The check comes when the hooks are out: check inside `with hooked(...)`.
length | Did you forget to normalise? direction may have any length.
inputs only | Only what enters the blocks is projected: inside each block r is back.
block outputs | Only what leaves the blocks is projected: inside each block r is back.
every Linear | Queries and keys are hooked, too, which do not write to the stream: ask `writers`.
misfit | The model fails on what you gave it: mind dtype and shape of what hooks return, of weights.
unit added | You added a unit vector: add `vector` with its own length.
next layer | This is added one layer late: hook what enters block `layer`.
again | This is added in more than one block: the stream carries it on by itself.
last only | This is added at the last position only: add it at every position.
no dose | Multiply by the coefficient.
log p | This is log p: the log-odds are log p - log(1 - p).
each alone | Do not add up the log-odds of single tokens: p is their probability together.
plain p | This is the probability: take the logarithm of its odds.
largest | Only the largest logit was counted: logsumexp adds all of them up.
unsure | Here 1 - p or p is 0 in any precision: take logsumexps of the logits.
reversed | This is KL(q || p): the average is under p, the first argument.
not summed | This is the mean over the vocabulary: the divergence is a sum.
epsilon | An epsilon inside the logarithm biases KL low: take log_softmax of the logits.
unnormalised | Logits are not log-probabilities: each still needs its log_softmax.
far apart | KL has no bound, and a quotient of probabilities is 0 / 0 here: log_softmax.
unmeasured | NaN is what was not measured, and never wins, relaxed or not.
edge | What lies exactly at a threshold passes: KL <= KL_MAX and induce >= INDUCE_MIN.
broken | This candidate breaks the model: drop what has KL > KL_MAX, relaxed or not.
late | This candidate is too late: only layers below int(LATE * n_layers) may win.
front | Count the position from the end: -1 is the last.
strict | Nothing passes all filters here: leave out the one on induce, and only that one.
weak | This candidate does not induce refusal, and another one does: induce >= INDUCE_MIN.
mixed | KL and induce are filters, no more: of what passes, the lowest bypass wins.
ints | A tuple of two ints is wanted, and these are tensors: item() makes ints.
transpose | The other axis: `axis` says which one writes; a nn.Linear stores (out, in).
moved | The axes are in another order now: move them back.
swapped | u and w are swapped: W . u says how much there is, and that many w go.
one vector | u and w differ before a norm: W . u says how much, and that many w go.
biases | The biases write to the stream, too.
embeddings | The embeddings write to the stream, too.
both | Embeddings and biases write to the stream, too.
head | The unembedding, which only reads, was edited with its tied embedding: untie first.
readers | Weights that only read the stream were edited: plan_edits gives those that write.
no gradients | Autograd has recorded nothing: that works inside `differentiable(model)`.
leaf | copy_ after `with differentiable(model)`: inside, autograd watches the weights.
example | Work out the docstring's example by hand: where does your code part from it?
names | Return the names of the edited parameters, a list, as named_parameters() has them.
"""))
SYMPTOMS = dict(rows("""
is not an iterator|n't yield|n't stop|context manager protocol | no yield
written to the stream by | not erased
no sum of the stream | no gradients
a leaf Variable | leaf
not iterable|zip\\(\\) | step
on a forward pass | misfit
"""))  # what a library's message tells about the slip


def blank(source, target="student.py"):
    """The source with a line that raises in place of the body of every exercise function."""
    lines, number = source.splitlines(keepends=True), {name: n for n, name in EXERCISES.items()}
    for node in reversed(ast.parse(source).body):
        name = getattr(node, "name", "")
        if name in number:
            task = (f"exercise {number[name]}: {name} is yours to write; grade it with "
                    f"REFUSAL={Path(target).name} pytest -k exercise_{number[name]}")
            line = f"    raise NotImplementedError({json.dumps(task)})\n"
            lines[node.body[0].end_lineno : node.end_lineno] = [line]
    return re.sub("^(if __name__ ==.*\n)", lambda line: line[0] + CHECK, "".join(lines), flags=re.M)


def write_blank(target):
    """python test_refusal.py blank FILE: write the student's copy; the exit status."""
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(blank((HERE / "refusal.py").read_text(encoding="utf-8"), target))
    except OSError as error:
        print(f"error: cannot write {target} ({error.strerror}): name a new file.", file=sys.stderr)
        return 2
    print(f"{target}: {len(EXERCISES)} exercises; the first: REFUSAL={target} pytest -k exercise_1")
    return 0


def hint(number, k="1"):
    """python test_refusal.py hint NUMBER [K]: print one hint; the exit status."""
    hints = [words for n, words in HINTS if n == number]
    if k not in map(str, range(1, len(hints) + 1)):
        print(f"error: no such hint; exercises are {', '.join(EXERCISES)}.", file=sys.stderr)
        return 2
    print(f"hint {k} of {len(hints)}: {hints[int(k) - 1]}")
    return 0


def grade(number):
    """Grade one exercise: what the student is told, nothing if it is solved."""
    try:
        globals()[f"test_exercise_{number}_{EXERCISES[number]}"]()
    except pytest.fail.Exception as failure:
        return str(failure)


def status(file=""):
    """python test_refusal.py status [FILE]: what is solved, blank and wrong; the exit status."""
    for number, name in EXERCISES.items():
        grade(number)
        print(f"{number:>3}  {name:<20}{GRADES[number]}")
    print(what_is_next())
    return 0


def what_is_next():
    left = [f"next: exercise {n}, {EXERCISES[n]}" for n in EXERCISES if GRADES[n] != "solved"]
    return [*left, "all exercises are solved"][0]


pytest_plugins = [] if PROGRAM else [__name__]  # this file is its own plugin: two hooks follow


def pytest_report_collectionfinish():
    if "REFUSAL" in os.environ:
        return f"graded: {os.environ['REFUSAL']}"
    if files := students_files():
        return f"graded: refusal.py, the solution; for yours, REFUSAL={files[0]} pytest -k exercise"


def pytest_terminal_summary(terminalreporter):
    if "REFUSAL" in os.environ:
        for n in [n for n in GRADES if GRADES[n] == "solved"]:
            terminalreporter.write_line(f"exercise {n} is solved: {ANSWERS[n]}")
        if len(GRADES) == len(EXERCISES):
            terminalreporter.write_line(what_is_next())


def fail(*words):
    pytest.fail(" ".join(filter(None, words)), pytrace=False)


def fail_if(mistaken, slip):
    if mistaken:
        fail(SLIPS[slip])


def same(a, b):
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-4, rtol=1e-3)


def check(got, want, what, advice="example", **slips):
    """Fail with words that teach: the shape first, then the values, then the dtype.

    slips: name in SLIPS -> what a usual mistake would give.  advice: if it is none of them.
    """
    if not isinstance(got, torch.Tensor):
        fail(f"{what}: a tensor of shape {tuple(want.shape)} is wanted, not {type(got).__name__}.")
    slip = next((name for name, wrong in slips.items() if same(got, wrong)), None)
    if got.shape != want.shape:
        fault = f"the shape is {tuple(got.shape)}, and {tuple(want.shape)} is wanted."
    elif not same(got.to(want.dtype), want):
        worst, slip = (got.double() - want.double()).abs().max().item(), slip or advice
        fault = f"the shape is right, the values are not (off by up to {worst:.3g})."
    elif got.dtype != want.dtype:
        fault, slip = f"{got.dtype} came back, and {want.dtype} is wanted.", "dtype"
    else:
        return
    fail(f"{what}: {fault}", SLIPS.get(slip))


def state(value, number):
    """All that an answer must leave as it was, to be compared with ==; 9b may change parameters."""
    if isinstance(value, torch.Tensor):
        content = value.detach().flatten().view(torch.uint8).numpy().tobytes()
        return value.dtype, value.requires_grad, isinstance(value, nn.Parameter) or content
    if isinstance(value, dict):
        return {name: state(x, number) for name, x in value.items()}
    if isinstance(value, nn.Module):
        hooks = {name: (m.training, len(vars(m)), [*m._forward_hooks], [*m._forward_pre_hooks])
                 for name, m in value.named_modules()}
        weights = {name: (state(p if number == "9b" else p.data, number), p.requires_grad)
                   for name, p in value.named_parameters()}
        return hooks | weights
    return repr(value)


def watched(function, number, given):
    """The student's function, which must leave its arguments as they were.

    given: the arguments of the latest call, to be named if it fails.
    """

    @contextmanager
    def inside(way, before):
        ended = False
        try:
            with way:
                yield
                ended = True
        except R.CannotDo:
            fail_if(ended, "late check")
            raise
        unchanged(before)

    def unchanged(before):
        for name, old in before.items():
            new, model = state(given[name], number), isinstance(given[name], nn.Module)
            kept = all(new[key] == old[key] for key in old) if model else new == old
            fail_if(not kept, "left behind" if model else "in place")

    def call(*args, **kwargs):
        given.clear()
        given.update(inspect.signature(function).bind(*args, **kwargs).arguments)
        before = {name: state(value, number) for name, value in given.items()}
        result = function(*args, **kwargs)
        if hasattr(result, "__enter__"):
            return inside(result, before)
        unchanged(before)
        return result

    return call


def describe(value):
    """An argument in a few words."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return {int: repr, float: repr, list: repr}.get(type(value), lambda x: type(x).__name__)(value)


def lesson(error, function, given):
    """An error in words: the student's own line where it happened, and what the function was given.

    A hook's error comes wrapped: the innermost that has a line of the function is told.
    """
    code, chain, where = inspect.unwrap(function).__code__, [error], ""
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    own = range(code.co_firstlineno, code.co_firstlineno + len(inspect.getsourcelines(code)[0]))
    for cause in reversed(chain):
        for at in traceback.extract_tb(cause.__traceback__):
            if at.filename == code.co_filename and at.lineno in own:
                where = f"{Path(at.filename).name}, line {at.lineno}: {at.line}\n"
        if where:
            break
    words = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    slips = [SLIPS[slip] for symptom, slip in SYMPTOMS.items() if re.search(symptom, words)]
    called = ", ".join(f"{name} {describe(value)}" for name, value in given.items())
    return "\n".join([f"{where}{words}", f"called with {called}", *slips])


def exercise(number):
    """Make a grader a test; the grader is given the student's function, watched."""

    def make(grader):
        def test():
            name, given, told = EXERCISES[number], {}, ""
            function, GRADES[number] = getattr(R, name), "wrong"
            oracles = {"template_tail": known_tail, "project_out": known_projection,
                       "erase": known_erase} | {name: function}
            try:
                with mock.patch.multiple(R, **oracles):
                    grader(watched(function, number, given))
                GRADES[number] = "solved"
            except Exception as error:
                told = lesson(error, function, given)
                if str(error).startswith("exercise "):
                    GRADES[number], told = "blank", str(error)
            if told:
                fail(told)

        test.__name__ = grader.__name__
        return test

    return make


def must_raise(kind, what, answer, *args):
    """The answer must refuse these arguments, and say why."""
    came = "nothing was raised."
    try:
        way = answer(*args)
        with way if hasattr(way, "__enter__") else nullcontext():
            pass
    except Exception as error:
        if isinstance(error, kind) or str(error).startswith("exercise "):
            return
        came = f"{type(error).__name__} came: {error}"
    fail(f"{what} must raise {kind.__name__}, and {came}")


known_tail = lambda tokenizer: tokenizer.convert_tokens_to_ids(["\u010a", "<|assistant|>"])


def known_projection(x, r):
    return (x.float() - torch.einsum("...i,i,j->...j", x.float(), r, r)).to(x.dtype)


def known_erase(W, axis, u, w):
    along = torch.tensordot(W, u, dims=([axis], [0])).unsqueeze(axis)
    return W - along * w.view([-1 if a == axis else 1 for a in range(W.ndim)])


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd_model():
    """A Llama in bfloat16 that is none to those who trust in signatures.

    Its blocks are given the stream as a keyword, and its attention, which scales what o_proj gives
    and so is the writer itself, returns a tuple.
    """

    class Block(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
        def __call__(self, hidden_states, **kwargs):
            return super().__call__(hidden_states=hidden_states, **kwargs)

    class Attention(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            x, weights = super().forward(*args, **kwargs)
            return 0.5 * x, weights

    model, tokenizer = small_model(8.0)
    for block in model.model.layers:
        block.__class__, block.self_attn.__class__ = Block, Attention
    return model.bfloat16(), tokenizer


def all_logits(model, tokenizer):
    with torch.no_grad():  # at two positions: some slips show before the last
        return R.forward(model, R.tokenize(tokenizer, PROMPTS), keep=2)


def hooked_logits(model, tokenizer, modules, change, entering=False):
    """Logits with every one of the modules' outputs (or inputs) changed by hand."""
    into, out = lambda m, args: (change(args[0]), *args[1:]), lambda m, args, x: change(x)
    with R.hooked(m.register_forward_pre_hook(into) if entering else m.register_forward_hook(out)
                  for m in modules):
        return all_logits(model, tokenizer)


@exercise("1")
def test_exercise_1_template_tail(answer):
    for name, (template, tail) in FORMS.items():
        _, tokenizer = small_model()
        tokenizer.chat_template, want = template, tokenizer.convert_tokens_to_ids(tail)
        got = answer(tokenizer)
        if not isinstance(got, list) or not all(isinstance(token, int) for token in got):
            fail(f"the tail: a list of token ids is wanted, not {got!r:.80}")
        fail_if(len(want) > 1 and got == want[::-1], "backwards")
        fail_if(got[-len(want) :] == want and len(got) > len(want), "instruction")
        fail_if(got != want and got == want[: len(got)], "generation")
        if got != want:
            fail(f"the tail of the template {name!r} is {tail}, and not",
                 f"{tokenizer.convert_ids_to_tokens(got)}: compare what prompts end on.")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    must_raise(R.CannotDo, "a template that adds nothing", answer, tokenizer)


@exercise("2")
def test_exercise_2_mean_activations(answer):
    model, tokenizer = small_model(8.0)

    def known(n):
        """One by one, as transformers gives them: prompt * (position, n_layers + 1, d_model)."""
        last, rows = [], []
        keep = lambda module, args: last.append(args[0])
        with torch.no_grad(), R.hooked([model.model.norm.register_forward_pre_hook(keep)]):
            for prompt in PROMPTS:
                ids = R.tokenize(tokenizer, [prompt])["input_ids"]
                states = [*model(ids, output_hidden_states=True).hidden_states[:-1], last.pop()]
                rows.append(torch.stack([x[0, -n:].double() for x in states], dim=1))
        return rows

    def run_out_once(module, args):
        if len(args[0]) > 1 and not failed:
            failed.append(module)
            raise RuntimeError("CUDA out of memory")

    first, second, third = known(2)
    mean, failed = (first + second + third) / 3, []
    want = mean[:, :-1]
    with mock.patch.object(R, "BATCH_SIZE", 2):  # the longest first: third, then the others
        check(answer(model, tokenizer, PROMPTS), want, "the mean", "wrong end", **{
            "leaving": mean[:, 1:], "one too many": mean, "layers first": want.transpose(0, 1),
            "mean of means": ((first + second) / 2 + third)[:, :-1] / 2, "a sum": 3 * want})
        with R.hooked([model.model.layers[-1].register_forward_pre_hook(run_out_once)]):
            try:
                fail_if(not same(answer(model, tokenizer, PROMPTS), want), "counted twice")
            except RuntimeError as error:  # of an answer that does without run_batches
                if not R.out_of_memory(error):
                    raise
        got = answer(model.bfloat16(), tokenizer, PROMPTS, n_positions=5)
    want = sum(known(5))[:, 0] / 3  # at layer 0, which is the same to the bit in any batch
    check(got[:, 0], want, "the mean with n_positions=5, of a bfloat16 model, at layer 0", "short")


@exercise("3")
def test_exercise_3_refusal_directions(answer):
    a, b = random(0, 2, 3, 5, 8).double().unbind()
    want = a - b
    check(answer(a, b), want, "the difference", **{
        "harmless first": -want, "averaged": want.mean(0),
        "too early": want / want.norm(dim=-1, keepdim=True)})


@exercise("4a")
def test_exercise_4a_project_out(answer):
    r = torch.eye(16)[3] * 0.6 + torch.eye(16)[9] * 0.8
    for shape in ((5, 7, 16), (3, 16), (16,)):
        x = random(1, *shape)
        want = known_projection(x, r)
        check(answer(x, r), want, "what is left", component=x - want, mirror=2 * want - x)
    x = (random(1, 9, 16) + 300 * r).bfloat16()
    check(answer(x, r), known_projection(x, r), "what is left of a bfloat16 tensor", "short")


@exercise("4b")
def test_exercise_4b_ablate(answer):
    model, tokenizer = small_model(8.0)
    r, plain, layers = R.unit(random(2, 32)), all_logits(model, tokenizer), model.model.layers
    project, embed = lambda x: known_projection(x, r), [model.model.embed_tokens]
    writing = embed + [m for b in layers for m in (b.self_attn.o_proj, b.mlp.down_proj)]
    wide = [m for m in layers.modules() if isinstance(m, nn.Linear) and m.out_features == 32]
    logits = functools.partial(hooked_logits, model, tokenizer)
    want = logits(writing, project)
    with answer(model, 3 * r):
        got = all_logits(model, tokenizer)
    check(got, want, "the ablated model's logits", **{
        "no effect": plain, "length": logits(writing, lambda x: known_projection(x, 3 * r)),
        "inputs only": logits(layers, project, entering=True),
        "block outputs": logits([*embed, *layers], project),
        "every Linear": logits(embed + wide, project)})
    with suppress(InterruptedError):
        with answer(model, 3 * r):
            raise InterruptedError
        fail_if(True, "swallowed")
    fail_if(not torch.equal(all_logits(model, tokenizer), plain), "left behind")
    for what, wrong in (("of another size", r[:1]), ("of length 0", 0 * r)):
        must_raise(R.BadUse, f"a direction {what}", answer, model, wrong)
    some = lambda model, all=R.writers: all(model)[:-1]
    with mock.patch.object(R, "writers", some), suppress(R.CannotDo), answer(model, r):
        fail_if(not same(all_logits(model, tokenizer), want), "unchecked")
    model, tokenizer = odd_model()
    with answer(model, 3 * r):
        R.check_erased(model, r)


@exercise("5")
def test_exercise_5_add(answer):
    model, tokenizer = small_model(8.0)
    vector, plain = 5 * random(3, 32), all_logits(model, tokenizer)

    def entering(shift, *layers):
        modules = [model.model.layers[layer] for layer in layers]
        return hooked_logits(model, tokenizer, modules, lambda x: x + shift, entering=True)

    last = torch.eye(R.tokenize(tokenizer, PROMPTS)["input_ids"].shape[1])[-1][:, None]
    for layer in (1, 0):
        with answer(model, vector, layer, coefficient=-0.5):
            got = all_logits(model, tokenizer)
        half = -0.5 * vector
        check(got, entering(half, layer), "the steered model's logits", **{
            "no effect": plain, "unit added": entering(-0.5 * R.unit(vector), layer),
            "next layer": entering(half, layer + 1), "last only": entering(half * last, layer),
            "again": entering(half, *range(layer, 4)), "no dose": entering(vector, layer)})
    for what, *wrong in (("layer 4 of 0 .. 3", vector, 4), ("layer -1", vector, -1),
                         ("an infinite coefficient", vector, 1, math.inf),
                         ("a vector of another size", vector[:1], 1)):
        must_raise(R.BadUse, what, answer, model, *wrong)
    model, tokenizer = odd_model()
    plain, seen = all_logits(model, tokenizer), []
    with R.reading(model, lambda layer, x: seen.append((x, x.clone()))), answer(model, vector, 1):
        fail_if(same(all_logits(model, tokenizer), plain), "no effect")
    fail_if(not all(torch.equal(x, old) for x, old in seen), "in place")


@exercise("6")
def test_exercise_6_log_odds(answer):
    logits, tokens, others = 3 * random(4, 2, 4, 9), [1, 5], [0, 2, 3, 4, 6, 7, 8]
    p = logits.double().softmax(-1)
    together = p[..., tokens].sum(-1)
    check(answer(logits, tokens), (together / (1 - together)).log().float(), "the score", **{
        "log p": together.log(), "each alone": (p / (1 - p)).log()[..., tokens].sum(-1),
        "largest": logits[..., tokens].amax(-1) - logits[..., others].amax(-1),
        "plain p": together})
    far = torch.tensor([200.0, 0.0, 0.0, -math.inf]) - 30000
    for token, score in ((0, 200 - math.log(2)), (1, -200.0)):
        check(answer(far, [token]), torch.tensor(score), "the score of a very sure model", "unsure")


@exercise("7")
def test_exercise_7_kl_divergence(answer):
    p, q = 4 * random(5, 2, 2, 3, 11)
    q[..., 0] -= 30  # a token that q all but excludes
    P, Q = p.double().softmax(-1), q.double().softmax(-1)
    want = (P * (P.log() - Q.log())).sum(-1).float()
    check(answer(p, q), want, "the divergence", **{
        "reversed": (Q * (Q.log() - P.log())).sum(-1), "not summed": want / 11,
        "epsilon": (P * ((P + 1e-6).log() - (Q + 1e-6).log())).sum(-1),
        "unnormalised": (P * (p - q)).sum(-1)})
    far = torch.tensor([[300.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 300.0]])
    want = torch.tensor([math.log(2), 150 - math.log(2)])
    check(answer(*far), want, "the divergence where logits are 300 nats apart", "far apart")
    P, Q = (x.bfloat16().double().log_softmax(-1) for x in (p, q))
    want = (P.exp() * (P - Q)).sum(-1).float()
    check(answer(p.bfloat16(), q.bfloat16()), want, "the divergence of bfloat16 logits", "short")


FATES = """
-3 -1 0 0 0 | .05 0 0 0 0 | .5 9 1 1 1 | (-1, 0) | (-1, 1) mixed (-1, 2) mixed (0, 0) front
1 -1 0 0 -5 / 2 -2 -9 -3 -5 | 0 0 0 0 0 / 0 0 7 0 0 | 1 1 1 1 1 / 1 1 1 -1 1 | (-1, 1) \
   | (-1, 2) broken (-2, 4) late (-1, 4) late (-1, 3) weak
1 -1 0 0 0 / 2 nan -9 -2 0 | 0 0 0 0 0 / 0 nan 7 nan 0 | -1 -1 -1 -1 -1 / -1 nan 1 nan 1 | (-2, 1) \
   | None strict (-1, 2) broken (-1, 4) late (-1, 1) unmeasured (-1, 3) unmeasured
0 -1 2 2 -2 -3 | 0 0 0 0 0 0 | 1 1 1 1 1 1 | (-1, 1) | (-1, 4) late
nan -1 -2 -3 0 | 0 0 0 0 0 | -1 -1 -1 nan -1 | (-1, 2) | (-1, 0) unmeasured (-1, 3) unmeasured
nan -1 -2 -3 0 | 0 0 0 nan 0 | 1 1 1 1 1 | (-1, 2) | (-1, 0) unmeasured (-1, 3) unmeasured
-1 -2 0 0 0 | 0 0 0 0 0 | 1 0 1 1 1 | (-1, 1) | (-1, 0) edge
-1 -2 0 0 0 | 0 .1 0 0 0 | 1 1 1 1 1 | (-1, 1) | (-1, 0) edge
-1 -1 -1 -1 -1 | 9 9 9 9 9 | -1 -1 -1 -1 -1 | None | (-1, 0) broken
nan nan nan nan nan | nan nan nan nan nan | nan nan nan nan nan | None | (-1, 0) unmeasured
"""  # bypass, KL, induce (/ is the next position), what is right, and what other answers say


@exercise("8")
def test_exercise_8_choose(answer):
    for *tables, want, others in rows(FATES):
        scores = {}
        for name, table in zip(("bypass", "kl", "induce"), tables):
            numbers = [float(x) for x in table.replace("/", "").split()]
            scores[name] = torch.tensor(numbers, dtype=torch.float64)
            scores[name] = scores[name].view(1 + table.count("/"), -1)
        got = str(answer(scores))
        fail_if("tensor" in got, "ints")
        if got != want:
            slip = re.search(rf"{re.escape(got)} (\w+)", others)
            fail(f"chosen: {got}, and {want} is right.", slip and SLIPS[slip[1]])


@exercise("9a")
def test_exercise_9a_erase(answer):
    r, u, w = R.unit(random(6, 6)), random(7, 6), random(8, 6)
    w = w / (u @ w)
    shapes = ((6, 6), 0), ((6, 4), 0), ((5, 6), 1), ((6,), 0), ((3, 4, 6), 2), ((3, 6, 4), 1)
    for shape, axis in shapes:
        W = random(9, *shape)
        want, what = known_erase(W, axis, r, r), f"a weight of shape {shape}, axis {axis} writes"
        slips = {"transpose": known_erase(W, 1, r, r)} if shape == (6, 6) else {}
        slips |= {"component": W - want, "moved": want.movedim(axis, -1)}
        check(answer(W, axis, r, r), want, what, **slips)
        check(answer(W, axis, u, w), known_erase(W, axis, u, w), f"{what}, before a norm",
              "one vector", **{
            "one vector": known_erase(W, axis, u, u), "swapped": known_erase(W, axis, w, u)})


@exercise("9b")
def test_exercise_9b_orthogonalize(answer):
    def fresh():
        model, tokenizer = small_model(
            8.0, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        for name, p in model.named_parameters():
            if p.ndim == 1:  # the final norm's gain turns some of the head's r onto other axes
                p.copy_(random(len(name), *p.shape))
        return model, tokenizer

    @torch.no_grad()
    def known(which, length=1, untie=True):
        """Edit the parameters of these names, by hand: (logits, names)."""
        model, tokenizer = fresh()
        if untie:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), False)
        edited = {name: p for name, p in model.named_parameters() if re.search(which, name)}
        for name, p in edited.items():
            axis = int(not re.search("[on]_proj", name))
            p.copy_(known_erase(p, axis, length * r, length * r))
        return all_logits(model, tokenizer), sorted(edited)

    r, blocks, both = R.unit(random(7, 32)), "[on]_proj", "embed|[on]_proj"
    model, tokenizer = fresh()
    names, (want, writing) = answer(model, 3 * r), known(both)
    check(all_logits(model, tokenizer), want, "the edited model's logits", "not erased", **{
        "biases": known(f"({both}).*weight")[0], "embeddings": known(blocks)[0],
        "both": known(f"{blocks}.weight")[0], "head": known(both, untie=False)[0],
        "readers": known(f"{both}|_proj.weight")[0], "length": known(both, 3)[0]})
    fail_if(not isinstance(names, list) or sorted(map(str, names)) != writing, "names")
    for what, wrong in (("of another size", r[:1]), ("of length 0", 0 * r)):
        must_raise(R.BadUse, f"a direction {what}", answer, model, wrong)
    model, tokenizer = fresh()
    some = lambda model, r, plan=R.plan_edits: dict([*plan(model, r).items()][:-1])
    with mock.patch.object(R, "plan_edits", some), suppress(R.CannotDo):
        answer(model, r)
        fail_if(not same(all_logits(model, tokenizer), want), "unchecked")
    model, tokenizer = odd_model()
    answer(model, 3 * r)
    R.check_erased(model, r)


# Answers that students give: bodies of functions or, with =>, what is changed in the first right
# one that has it.  Then what must be said: a name in SLIPS, or words of the message.

RIGHT = re.findall(r"^# (\w+)\n((?:(?!# ).*\n)+)", r'''
# 1
chats = [tokenize(tokenizer, [p])["input_ids"][0].tolist() for p in ("Say yes", "Why? 1", "(ten)!")]
tail = common_end(chats)
if not tail: raise CannotDo("no tail")
return tail
# 1
(a,), (b,) = (tokenize(tokenizer, [p])["input_ids"].tolist() for p in ("Hi", "Ha ha"))
n = next(i for i in range(1, len(a)) if a[-i] != b[-i]) - 1
if n: return a[-n:]
raise CannotDo("no tail")
# 2
n = n_positions or len(template_tail(tokenizer))
x = activations(model, tokenizer, prompts, list(range(-n, 0))).double()
return x[:, :, :-1].mean(0)
# 2
total, n = 0, n_positions or len(template_tail(tokenizer))
def step(batch):
    nonlocal total
    seen = []
    with reading(model, lambda layer, x: seen.append(x[:, -n:].double())): forward(model, batch)
    rows = torch.stack(seen[:-1], 2)
    total = total + rows.sum(0)
    return rows
run_batches(step, model, tokenize(tokenizer, prompts))
return total / len(prompts)
# 2
n, rows = n_positions or len(template_tail(tokenizer)), []
for batch in [tokenize(tokenizer, [prompt]) for prompt in prompts]:
    states = model(**batch, output_hidden_states=True).hidden_states[:-1]
    rows.append(torch.stack([x[0, -n:].detach().double() for x in states], 1))
return sum(rows) / len(rows)
# 3
return torch.sub(harmful_mean, harmless_mean)
# 3
return -(harmless_mean - harmful_mean)
# 4a
return (x.float() - (x.float() @ r)[..., None] * r).to(x.dtype)
# 4a
return (x.double() - (x.double() * r).sum(-1, keepdim=True) * r).to(x.dtype)
# 4b
r = check_direction(model, direction)
with hooked(after(m, lambda x: project_out(x, r)) for m in writers(model)):
    check_erased(model, r)
    yield
# 4b
r = check_direction(model, direction)
hook = lambda m, args, x: (project_out(x[0], r), *x[1:]) if type(x) is tuple else project_out(x, r)
handles = [m.register_forward_hook(hook) for m in writers(model)]
try:
    with erasing(model, r): yield
finally:
    for handle in handles: handle.remove()
# 5
check_direction(model, vector)
if not 0 <= layer < len(blocks(model)) or not math.isfinite(coefficient): raise BadUse("no layer")
with hooked([before(blocks(model)[layer], lambda x: x + (coefficient * vector).to(x.dtype))]): yield
# 5
v = check_direction(model, vector) * vector.norm() * coefficient
if layer not in range(len(blocks(model))) or not v.isfinite().all(): raise BadUse("no")
handle = before(blocks(model)[layer], lambda x: (x.float() + v).to(x.dtype))
try: yield
finally: handle.remove()
# 6
others = [i for i in range(logits.shape[-1]) if i not in tokens]
return logits[..., tokens].logsumexp(-1) - logits[..., others].logsumexp(-1)
# 6
rest = logits.clone()
rest[..., tokens] = -math.inf
return logits[..., tokens].logsumexp(-1) - rest.logsumexp(-1)
# 7
p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
return (p.exp() * (p - q)).sum(-1)
# 7
p, q = (x.double() - x.double().logsumexp(-1, keepdim=True) for x in (p_logits, q_logits))
return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).float()
# 8
b, kl, induce = (scores[name] for name in ("bypass", "kl", "induce"))
n, L = b.shape
for floor in (INDUCE_MIN, -math.inf):
    best = [(b[i, l].item(), i - n, l) for i in range(n) for l in range(int(LATE * L))
            if kl[i, l] <= KL_MAX and induce[i, l] >= floor and b[i, l] < math.inf]
    if best: return min(best)[1:]
# 8
ok = (scores["kl"] <= 0.1) & ~scores["bypass"].isnan() & ~scores["induce"].isnan()
ok[:, int(0.8 * ok.shape[1]) :] = False
if (ok & (scores["induce"] >= 0)).any(): ok &= scores["induce"] >= 0
places = sorted(ok.nonzero().tolist(), key=lambda at: scores["bypass"][at[0], at[1]].item())
return (places[0][0] - len(ok), places[0][1]) if places else None
# 9a
along = torch.tensordot(W, u, ([axis], [0])).unsqueeze(axis)
return W - w.view([-1 if a == axis else 1 for a in range(W.ndim)]) * along
# 9a
X = W.clone().transpose(axis, 0)
X -= w.view(-1, *[1] * (W.ndim - 1)) * torch.einsum("d...,d->...", X, u)
return X.transpose(axis, 0)
# 9b
r = check_direction(model, direction)
untie(model)
edits = plan_edits(model, r)
for W, axis, u, w in edits.values():
    W.copy_(erase(W.float(), axis, u, w))
check_erased(model, r)
return list(edits)
# 9b
untie(model)
edits = plan_edits(model, check_direction(model, direction))
for p, axis, *uw in edits.values(): p.data = erase(p.float(), axis, *uw).to(p.dtype)
check_erased(model, unit(direction))
return [*edits]
''', re.MULTILINE)
WRONG = rows(r'''
1 | tokenize(tokenizer, [p])["input_ids"][0].tolist() => tokenizer.apply_chat_template([{"role": \
    "user", "content": p}])["input_ids"] | generation
1 | return tail => return tail[::-1] | backwards
1 | ("Say yes", "Why? 1", "(ten)!") => ("Say yes", "He says yes") | instruction
1 | return tail => return tuple(tail) | a list of token ids is wanted
1 | return tail => return tail[-2:] | compare what prompts end on
1 | if not tail: raise CannotDo("no tail") => pass | must raise CannotDo, and nothing
2 | [:, :, :-1] => [:, :, 1:] | leaving
2 | [:, :, :-1] =>  | one too many
2 | mean(0) => mean(0).transpose(0, 1) | layers first
2 | mean(0) => sum(0) | a sum
2 | -n, 0 => n | wrong end
2 | .double() =>  | dtype
2 | .mean(0) => .to(model.dtype).mean(0).double() | short
2 | n_positions or =>  | n_positions=5
2 | rows.sum(0) => rows.mean(0) * len(prompts) / -(-len(prompts) // BATCH_SIZE) | mean of means
2 | return rows => return None | step
2 | total, n = [0] * 9, len(template_tail(tokenizer))\ndef see(l, x): total[l] = total[l] + \
    x[:, -n:].double().sum(0)\ndef step(batch):\n  with reading(model, see): forward(model, batch)\
\n  return batch["input_ids"][:, 0]\nrun_batches(step, model, tokenize(tokenizer, prompts))\n\
return torch.stack(total[:4], 1) / len(prompts) | counted twice
3 | return harmless_mean - harmful_mean | harmless first
3 | return nn.functional.normalize(harmful_mean - harmless_mean, dim=-1) | too early
3 | return (harmful_mean - harmless_mean).mean(0) | averaged
3 | harmful_mean -= harmless_mean\nreturn harmful_mean | in place
3 | return (harmful_mean - harmless_mean).float() | dtype
4a | return (x.float() @ r)[..., None] * r | component
4a | return x - 2 * (x @ r)[..., None] * r | mirror
4a | x -= (x @ r)[..., None] * r\nreturn x | in place
4a | return x - (x @ r) * r | return x - (x @ r) * r
4a | return x - (x @ r)[..., None] * r | return x - (x @ r)[..., None] * r
4a | r = r.to(x.dtype)\nreturn x - (x @ r)[..., None] * r | short
4a | .to(x.dtype) =>  | dtype
4b | check_erased(model, r) => pass | unchecked
4b | yield => pass\nyield | no effect
4b | check_erased(model, r)\n    yield => yield\ncheck_erased(model, r) | late check
4b | check_direction(model, direction) => unit(direction) | a direction of another size
4b | check_direction(model, direction) => direction\ncheck_erased = print | length
4b | after(m, lambda x: project_out(x, r)) for m in writers(model) => before(m, lambda x: \
    project_out(x, r)) for m in blocks(model) | not erased
4b | hooked(after(m, lambda x: project_out(x, r)) for m in writers(model)):\n    check_erased( => \
    hooked(before(m, lambda x: project_out(x, r)) for m in blocks(model)):\n    print( | inputs only
4b | writers(model)):\n    check_erased( => [writers(model)[0], *blocks(model)]):\n    print( \
   | block outputs
4b | writers(model) => [m for m in model.modules() if 32 in (getattr(m, "out_features", 0), \
    getattr(m, "embedding_dim", 0))] | every Linear
4b | finally => except ZeroDivisionError | left behind
4b | yield => try: yield\n    except Exception: pass | swallowed
4b | yield => pass | no yield
4b | project_out(x, r)) => x - (x @ r)[..., None] * r) | x - (x @ r)[..., None] * r
4b | project_out(x, r)) => project_out(x.float(), r)) | misfit
4b | (project_out(x[0], r), *x[1:]) if type(x) is tuple else =>  | 'tuple' object
5 | yield | no effect
5 | (coefficient * vector) => (coefficient * unit(vector)) | unit added
5 | before(blocks(model)[layer], => after(blocks(model)[layer], | next layer
5 | hooked([before(blocks(model)[layer], => hooked([before(block, lambda x: x + coefficient * \
    vector) for block in blocks(model)[layer:]] or [before(blocks(model)[layer], | again
5 | x + (coefficient * vector) => x + (coefficient * vector * torch.eye(x.shape[1])[-1][:, None]) \
   | last only
5 | coefficient * vector => vector | no dose
5 | x + ( => x.add_( | in place
5 | check_direction(model, vector) => pass | a vector of another size
5 | 0 <= layer < => layer < | layer -1
5 | not 0 <= layer < len(blocks(model)) or =>  | layer 4
5 | or not math.isfinite(coefficient) =>  | an infinite coefficient
5 | .to(x.dtype)) => ) | misfit
5 | before(blocks(model)[layer], lambda x: x + (coefficient * vector).to(x.dtype)) => \
    blocks(model)[layer].register_forward_pre_hook(lambda m, args: args[0] + coefficient * vector) \
   | args[0] + coefficient * vector
6 | return logits.softmax(-1)[..., tokens].sum(-1).log() | log p
6 | return torch.logit(logits.softmax(-1)[..., tokens]).sum(-1) | each alone
6 | return logits.softmax(-1)[..., tokens].sum(-1) | plain p
6 | p = logits.softmax(-1)[..., tokens].sum(-1)\nreturn (p / (1 - p)).log() | unsure
6 | p = logits.log_softmax(-1)[..., tokens].logsumexp(-1)\nreturn p - (-p.exp()).log1p() | unsure
6 | .logsumexp(-1) => .amax(-1) | largest
6 | logits.clone() => logits | in place
7 | (p.exp() * (p - q)) => (q.exp() * (q - p)) | reversed
7 | .sum(-1) => .mean(-1) | not summed
7 | p, q = p_logits.softmax(-1), q_logits.softmax(-1)\n\
return (p * ((p + 1e-6).log() - (q + 1e-6).log())).sum(-1) | epsilon
7 | p, q = p_logits.softmax(-1), q_logits.softmax(-1)\nreturn (p * (p / q).log()).sum(-1) \
   | far apart
7 | .sum(-1) => .sum(-1).clamp(max=100) | far apart
7 | (p - q) => (p_logits - q_logits) | unnormalised
7 | .float().log => .log | short
8 | kl[i, l] <= KL_MAX and =>  | broken
8 | kl[i, l] <= KL_MAX and => (kl[i, l] <= KL_MAX or floor < 0) and | broken
8 | int(LATE * L) => math.ceil(LATE * L) | late
8 | (INDUCE_MIN, -math.inf) => (INDUCE_MIN,) | strict
8 | (INDUCE_MIN, -math.inf) => (-math.inf,) | weak
8 | i - n, l) => i, l) | front
8 | and b[i, l] < math.inf =>  | unmeasured
8 | kl[i, l] <= KL_MAX => not kl[i, l] > KL_MAX | unmeasured
8 | induce[i, l] >= floor => not induce[i, l] < floor | unmeasured
8 | <= KL_MAX => < KL_MAX | edge
8 | >= floor => > floor | edge
8 | (b[i, l].item() => ((b - induce)[i, l].item() | mixed
8 | min(best)[1:] => tuple(torch.tensor(min(best)[1:])) | ints
8 | n, L = b.shape => n, L = b.shape\nb[kl > KL_MAX] = math.inf | in place
9a | return W - torch.outer(w, u @ W) | return W - torch.outer(w, u @ W)
9a | return W - (W @ u)[..., None] * w | transpose
9a | return W - w[:, None] * (u @ W) if axis == 0 else W - (W @ u)[..., None] * w \
   | shape (6,), axis 0
9a | W = W.movedim(axis, -1)\nreturn W - (W @ u)[..., None] * w | moved
9a | return W - w => return w | component
9a | (W, u, => (W, w, | one vector
9a | W = W.movedim(axis, -1)\nreturn (W - (W @ w)[..., None] * u).movedim(-1, axis) | swapped
9a | W.clone() => W | in place
9b | check_erased(model, r) => pass | unchecked
9b | untie(model) => pass | head
9b | check_direction(model, direction) => unit(direction) | a direction of another size must raise
9b | check_direction(model, direction)\nuntie => direction\ncheck_erased = print\nuntie | length
9b | list(edits) => None | names
9b | r = check_direction( => direction /= 3\nr = check_direction( | in place
9b | W.float() => W | erase(W, axis
9b | W.copy_(erase(W.float(), axis, u, w)) => W.data = erase(W.float(), axis, u, w) | misfit
9b | for W => with differentiable(model):\n  for W | leaf
9b | edits = => check_erased = print\nedits = {n: e for n, e in plan_edits(model, r).items() if \
    "bias" not in n}\nrest = | biases
9b | edits = => check_erased = print\nedits = {n: e for n, e in plan_edits(model, r).items() if \
    "embed" not in n}\nrest = | embeddings
9b | edits = => check_erased = print\nedits = {n: e for n, e in plan_edits(model, r).items() if \
    "_proj.weight" in n}\nrest = | both
9b | plan_edits(model, r)\n => plan_edits(model, r)\nfor n, p in model.named_parameters():\n\
  if "_proj.weight" in n: edits.setdefault(n, (p, 1, r, r))\n | readers
9b | made, writes = trace_writers(model) | no gradients
9b | names = dict(model.named_modules())\nr = unit(direction)\nwith differentiable(model):\n\
  made, nodes = trace_writers(model)\n  weights_of(nodes[0], r, r, made, names) | weights_of(
''')


def answered(number, answer, folder):
    """Put an answer in the place of its function, written to a file as students do."""
    name, body = EXERCISES[number], answer
    if "=>" in answer:
        old, new = (part.strip(" ").replace("\\n", "\n") for part in f"{answer} ".split("=> "))
        body = next(right for n, right in RIGHT if n == number and old in right).replace(old, new)
    head, docstring, _ = inspect.getsource(inspect.unwrap(getattr(R, name))).split('"""', 2)
    body = textwrap.indent(body.replace("\\n", "\n"), "    ")
    path = folder / "student.py"
    path.write_text(f'{head}"""{docstring}"""\n{body}', encoding="utf-8")
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), vars(R), made := {})
    return mock.patch.object(R, name, made[name])


@pytest.mark.parametrize("number, answer, words", WRONG, ids=[f"{n}-{w}" for n, _, w in WRONG])
def test_classroom_wrong_answers(tmp_path, number, answer, words):
    with answered(number, answer, tmp_path):
        told = grade(number)
    assert SLIPS.get(words, words.replace("\\n", "\n")) in told and told == told.strip()
    assert [slip for slip in SLIPS if SLIPS[slip] in told] in ([words], [])


@pytest.mark.parametrize("number, body", RIGHT)
def test_classroom_right_answers(tmp_path, number, body):
    with answered(number, body, tmp_path):
        assert not grade(number)


def test_classroom_blanks_differ_in_bodies_only():
    source = Path(R.__file__).read_text(encoding="utf-8")
    text = blank(source)
    old, new = (ast.parse(t).body for t in (source, text.replace(CHECK, "")))
    assert text.count(CHECK) == 1 and len(old) == len(new)
    for ours, theirs in zip(old, new):
        if getattr(theirs, "name", "") in EXERCISES.values():
            assert "is yours to write" in ast.unparse(theirs.body.pop())
            ours.body = ours.body[:1]  # the docstring
        assert ast.dump(ours) == ast.dump(theirs)


def test_classroom_every_blank_fails_and_each_can_be_solved_alone(tmp_path):
    write_blank(tmp_path / "student.py")
    blanks = load(tmp_path / "student.py")
    for number, name in EXERCISES.items():
        others = {other: getattr(blanks, other) for other in EXERCISES.values() if other != name}
        with mock.patch.multiple(R, **others):
            assert not grade(number) and GRADES[number] == "solved"
        with mock.patch.object(R, name, getattr(blanks, name)):
            assert grade(number).startswith(f"exercise {number}: {name} is yours to write")
            assert GRADES[number] == "blank"


def test_classroom_commands(tmp_path, capsys):
    blank_5 = "raise NotImplementedError('exercise 5: yours')\nyield"
    with answered("3", "return harmless_mean", tmp_path), answered("5", blank_5, tmp_path):
        status()
    said = capsys.readouterr().out.split("\n")
    assert [line.split()[-1] for line in said[2:6]] == ["wrong", "solved", "solved", "blank"]
    assert said[1].endswith(" solved") and said[-2] == "next: exercise 3, refusal_directions"
    assert hint("4a") == hint("4a", "2") == 0 and hint("4a", "9") == hint("4") == 2
    out, err = capsys.readouterr()
    assert out.startswith("hint 1 of 2: ") and "4a, 4b" in err
    mine = tmp_path / "mine.py"
    mine.write_text("precious")
    assert write_blank(mine) == 2 and mine.read_text() == "precious"


@pytest.mark.parametrize("text, words", [
    (None, "student.py is not there: name the file"),
    ("x = (\n", "student.py, line 1: x = (: '(' was never closed"),
    ("\nx = y\n", "student.py, line 2: x = y: NameError: name 'y' is not defined")])
def test_classroom_files_that_cannot_be_loaded(tmp_path, monkeypatch, text, words):
    monkeypatch.setenv("REFUSAL", str(tmp_path / "student.py"))
    if text:
        (tmp_path / "student.py").write_text(text)
    with pytest.raises(pytest.Collector.CollectError) as stop:
        load_graded()
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_classroom_in_a_folder_of_its_own(tmp_path):
    shutil.copytree(R.PROMPTS, tmp_path / "prompts")
    shutil.copy(__file__, tmp_path / "test_refusal.py")
    student = tmp_path / "student.py"
    write_blank(student)

    def run(*command, **names):
        env = {name: x for name, x in os.environ.items() if name != "REFUSAL"} | names
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert not re.search("Traceback|^>|^test_refusal.py:", done.stdout, re.MULTILINE)
        return done.stdout

    pytest_q = "-m", "pytest", "-q", "-p", "no:cacheprovider"
    assert re.fullmatch(r"next: exercise 1: .*exercise_1 \(11 still blank\)\n", run("student.py"))
    assert "refusal.py is not there" in run(*pytest_q)
    student.write_text(re.sub("raise .*exercise 3:.*", "return harmful_mean - harmless_mean",
                              student.read_text(encoding="utf-8")), encoding="utf-8")
    said = run(*pytest_q, REFUSAL="student.py")
    assert said.strip().startswith("graded: student.py\n") and "10 failed, 1 passed" in said
    assert re.findall(r"FAILED .*_exercise_(\w+?)_", said) == [n for n in EXERCISES if n != "3"]
    assert ANSWERS["3"] in said and ANSWERS["1"] not in said and "next: exercise 1, templ" in said
    shutil.copy(R.__file__, tmp_path / "refusal.py")
    said = run(*pytest_q, "-k", "exercise_3").strip()
    assert said.startswith("graded: refusal.py, the solution; for yours, REFUSAL=student.py pytest")


# %% Every architecture: the census ----------------------------------------------------------------
#
# refusal.py keeps no table of architectures, so its claim is about all of them.  Here it is held to
# that: a tiny random model of every decoder in transformers, and for each one the proofs that
# reading, ablating, adding and orthogonalizing do what they say.  `pytest` runs a dozen.
#
# The verdicts.  "exact": the edited weights and the hooks are one function.  "near": a norm writes
# to the stream, so the weights come r-free but only close (see through_norm).  "refused": CannotDo,
# from ablate or only from orthogonalize.  What is not listed is exact; wrong is no verdict.

NEAR = set(
    "afmoe axk1 beam bloom exaone4 flex_olmo gemma2 gemma2-untied gemma3_text gemma4_text "
    "gemma4_text-moe gemma4_unified_text glm4 hyperclovax kolibri1 lfm3 modernbert-decoder "
    "nanochat olmo2 olmo3 olmo_hybrid".split())
REFUSED = set((
    "ctrl xglm "  # the positions are fixed waves that no module learns
    "bloom-residual-after-norm doge minimax openai-gpt opt-norm-after opt-projected rwkv zaya "
    #   the stream is scaled or normed itself, not only added to
    "deepseek_v4 gemma3n_text hy_v4 inkling2_text qwen4_exp_text reformer "  # several streams
    "hrm_text inkling2_loop_text dory "  # blocks that are run in a loop
    "gpt_neox_japanese "  # a bias is added by the block itself
    "inkling_text longcat_flash"  # weights only: a writer mixes the channels it is given
).split())
DOZEN = ("llama qwen2-tied gpt2 gptj gemma2 mixtral gpt_oss bloom opt olmo2 falcon cohere phi "
         "qwen3_next zaya").split()

# One table of sizes serves all families: whatever a configuration calls a thing, it gets its tiny
# value (a width of 48; 4 heads of 16: not the hidden size; scales away from the 1 at which one
# forgets them).  Then what a family needs beyond that, and variants, as a config.json has them.
VOCAB, D = 120, 48
SIZES = """
120: vocab_size vocab_size_per_layer_input
48: hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width
80: intermediate_size n_inner ffn_dim ffn_hidden_size dff intermediate_size_mlp
80: prefix_dense_intermediate_size dense_intermediate_size feed_forward_size
40: moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
40: moe_shared_expert_intermediate_size shared_experts_intermediate_size
40: expert_ffn_hidden_size
3: num_hidden_layers n_layer n_layers num_layers num_blocks mamba_dt_rank time_step_rank
4: num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads
4: num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads
4: mamba_num_heads n_mamba_heads linear_num_heads linear_num_value_heads
2: num_key_value_heads num_kv_heads swa_num_key_value_heads eos_token_id
2: num_experts_per_tok moe_topk moe_k top_k_experts n_group index_n_heads
2: index_topk_blocks linear_num_key_heads mamba_n_groups n_groups mamba_ngroups
16: head_dim kv_channels swa_head_dim qk_nope_head_dim index_head_dim indexer_head_dim
16: index_block_size linear_head_dim linear_key_head_dim mamba_chunk_size chunk_size
128: max_position_embeddings n_positions n_ctx max_seq_len context_length
64: sliding_window sliding_window_size attention_window_size local_attention
64: attention_chunk_size window_size
0: pad_token_id
1: bos_token_id num_shared_experts n_shared_experts moe_num_shared_experts topk_group
1: first_k_dense_replace num_dense_layers
20: q_lora_rank o_lora_rank
24: kv_lora_rank index_topk mamba_d_head mamba_head_dim
8: qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank hc_lowrank
8: gated_norm_rank mamba_d_state state_size ssm_state_size
12: v_head_dim linear_value_head_dim query_pre_attn_scalar
3.0: embedding_multiplier embedding_scale
0.7: residual_multiplier logit_scale lm_head_multiplier key_multiplier
0.3: attention_multiplier
1.5: logits_scaling logits_mup_width_multiplier
0.8: attention_in_multiplier attention_out_multiplier ssm_in_multiplier ssm_out_multiplier
""".strip().splitlines()
SIZES = {name: json.loads(line.split(":")[0]) for line in SIZES for name in line.split()[1:]}


def of_json(text):
    """A table as a config.json has it; SWA, FULL and LINEAR are kinds of attention."""
    for short, long in (("SWA", "sliding"), ("FULL", "full"), ("LINEAR", "linear")):
        text = text.replace(f'"{short}"', f'"{long}_attention"')
    return json.loads(text)


FAMILY = of_json("""
{"bamba": {"attn_layer_indices": [1]}, "cohere_compass_text": {"layer_types": ["SWA", "FULL",
"SWA"], "rope_parameters": {"SWA": {"rope_type": "default", "rope_theta": 10000.0,
"mrope_section": [4, 2, 2]}, "FULL": {"rope_type": "default", "rope_theta": 10000.0,
"mrope_section": [4, 2, 2]}}}, "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0,
"clip_qkv": 8.0}, "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 80, "moe_num_experts": 4,
"moe_top_k": 2}}, "dory": {"sliding_window": 128}, "dots1": {"layer_types": ["SWA", "FULL",
"SWA"]}, "dots3_note_text": {"head_dim": 24, "swa_num_attention_heads": 4,
"swa_num_key_value_heads": 4, "swa_q_lora_rank": 20, "swa_kv_lora_rank": 24, "swa_head_dim": 24,
"swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12}, "falcon_h1": {"mamba_d_ssm": 96,
"mlp_multipliers": [0.8, 1.3], "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 0.7]}, "gemma3n_text":
{"num_hidden_layers": 4, "num_kv_shared_layers": 2}, "gemma4_text": {"layer_types": ["SWA",
"FULL", "FULL"]}, "gemma4_unified_text": {"layer_types": ["SWA", "FULL", "FULL"]}, "glm4_moe":
{"head_dim": 16}, "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]}, "gpt_oss":
{"intermediate_size": 48}, "granitemoehybrid": {"layer_types": ["LINEAR", "FULL", "LINEAR"]},
"helium": {"head_dim": 12}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "laguna":
{"layer_types": ["FULL", "SWA", "FULL"], "num_attention_heads_per_layer": [4, 6, 4]}, "lfm2":
{"layer_types": ["conv", "FULL", "conv"], "block_multiple_of": 8}, "lfm2_moe": {"layer_types":
["conv", "FULL", "conv"]}, "longcat_flash": {"zero_expert_num": 2, "head_dim": 8}, "mamba2":
{"head_dim": 24}, "mellum": {"layer_types": ["FULL", "SWA", "FULL"], "mlp_layer_types": ["dense",
"sparse", "sparse"]}, "minimax_m3_vl_text": {"layer_types": ["FULL", "minimax_m3_sparse", "FULL"],
"mlp_layer_types": ["dense", "sparse", "sparse"]}, "minicpm3": {"scale_emb": 3, "dim_model_base":
32}, "ministral": {"layer_types": ["SWA", "FULL", "SWA"]}, "nemotron_h": {"layers_block_type":
["LINEAR", "moe", "FULL", "mlp"]}, "qwen3_moe": {"head_dim": 16}, "qwen4_exp_text":
{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 64, "indexer_compress_ratio": 4},
"reformer": {"is_decoder": true, "axial_pos_embds": false, "attn_layers": ["local", "lsh",
"local"], "hash_seed": 0}, "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta":
10000.0, "partial_rotary_factor": 0.5}}, "xlstm": {"hidden_size": 128, "embedding_dim": 128},
"youtu": {"pad_token_id": null}, "zamba": {"layers_block_type": ["hybrid", "LINEAR", "hybrid"]},
"zamba2": {"layers_block_type": ["hybrid", "LINEAR", "hybrid"]}, "zaya": {"num_experts_per_tok":
1}}
""")
VARIANTS = of_json("""
{"bloom-residual-after-norm": {"apply_residual_connection_post_layernorm": true},
"cohere-qk-norm": {"use_qk_norm": true}, "deepseek_v3-no-q-lora": {"q_lora_rank": null},
"falcon-alibi-sequential": {"alibi": true, "parallel_attn": false, "bias": true},
"falcon-multi-head": {"multi_query": false, "num_kv_heads": 4}, "falcon-new":
{"new_decoder_architecture": true}, "falcon-new-one-norm": {"new_decoder_architecture": true,
"num_ln_in_parallel_attn": 1}, "gemma4_text-moe": {"enable_moe_block": true, "num_experts": 4,
"top_k_experts": 2}, "gpt_neox-sequential": {"use_parallel_residual": false}, "llama-biased":
{"attention_bias": true, "mlp_bias": true}, "mpt-biased": {"no_bias": false}, "olmo-clipped":
{"clip_qkv": 0.5}, "opt-norm-after": {"do_layer_norm_before": false}, "opt-projected":
{"do_layer_norm_before": false, "word_embed_proj_dim": 32}, "opt-projected-before":
{"word_embed_proj_dim": 32}, "phi-qk-norm": {"qk_layernorm": true}, "qwen2-sliding":
{"layer_types": ["FULL", "SWA", "FULL"], "use_sliding_window": true}, "qwen2_moe-mixed":
{"mlp_only_layers": [0]}, "qwen3_moe-mixed": {"mlp_only_layers": [0]}, "stablelm-parallel":
{"use_parallel_residual": true}, "stablelm-qk-norm": {"qk_layernorm": true, "use_qkv_bias": true},
"gpt_neox-tied": {"tie_word_embeddings": true}, "gptj-tied": {"tie_word_embeddings": true},
"granite-tied": {"tie_word_embeddings": true}, "llama-tied": {"tie_word_embeddings": true},
"phi-tied": {"tie_word_embeddings": true}, "qwen2-tied": {"tie_word_embeddings": true},
"qwen3-tied": {"tie_word_embeddings": true}, "cohere-untied": {"tie_word_embeddings": false},
"gemma-untied": {"tie_word_embeddings": false}, "gemma2-untied": {"tie_word_embeddings": false},
"gpt2-untied": {"tie_word_embeddings": false}, "opt-untied": {"tie_word_embeddings": false},
"smollm3-untied": {"tie_word_embeddings": false}, "starcoder2-untied": {"tie_word_embeddings":
false}}
""")
SKIP = set((  # encoders; halves; other inputs; wrappers of a *_text; assistants
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod cpmant "
    "xlnet bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet trocr whisper moss_transcribe_diarize musicgen musicgen_melody fuyu git got_ocr2 "
    "dots3_note gemma3 gemma3n gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp "
    "phi4_multimodal blt gemma4_assistant gemma4_unified_assistant"
).split())
NAMES = [name for name in CAUSAL_LMS if name not in SKIP] + list(VARIANTS)


def tiny_of(name):
    """A tiny random float32 model of this family or variant, always the same, or KeyError."""
    family = name if name in CAUSAL_LMS else name.partition("-")[0]
    cls = transformers.CONFIG_MAPPING[family]
    cls = cls.sub_configs.get("text_config", cls)
    default, given = cls(), FAMILY.get(family, {}) | VARIANTS.get(name, {})
    sizes = {key: value for key, value in SIZES.items() if key in cls.__dataclass_fields__}
    if "kv_lora_rank" in sizes:  # latent attention has a key and a value for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for key, value in vars(default).items():  # a list with an entry a layer: all its kinds of layer
        fields = cls.__dataclass_fields__.keys() - SIZES
        one_a_layer = isinstance(value, (list, tuple)) and len(value) == default.num_hidden_layers
        if one_a_layer and key in fields:
            kinds = list(dict.fromkeys(value))
            sizes[key] = [kinds[i % len(kinds)] for i in range(given.get("num_hidden_layers", 3))]
    torch.manual_seed(0)
    model = getattr(transformers, CAUSAL_LMS[family])(cls(**sizes | given))
    with torch.no_grad():
        randomise(model)
    return model.float().eval().requires_grad_(False)


def randomise(model):
    """No parameter stays zero or one, and every layer adds as much to the stream as is there."""
    for path, p in model.named_parameters():  # a tied parameter comes once, as the embedding
        module, noise = model.get_submodule(path.rpartition(".")[0]), torch.randn_like(p)
        if re.search(r"A_log|\.D$|dt_|time_", path):  # state spaces take little change
            p.add_(0.1 * noise)
        elif "bias" in path.rpartition(".")[2]:
            p.copy_(0.1 * noise)
        elif p.ndim < 2 or "norm" in type(module).__name__.lower():
            p.add_(0.3 * noise)
        else:
            p.copy_((0.4 if isinstance(module, torch.nn.Embedding) else 0.15) * noise)
    for path, buffer in model.state_dict().items():
        if re.search(r"(correction|expert)_bias$|balancing_biases$|layer_scalar$", path):  # learned
            buffer.add_(0.1 * torch.randn_like(buffer))


class Sums(TorchDispatchMode):
    """Follows the stream through a forward pass, and finds the most of r in it: max |x.r| / |x|.

    It knows no modules and no writers, only memory: what enters block 0 is the stream; so is every
    view, cast or scaled copy of it, and all that is added to it.  What enters a later block must
    have been reached in this way.
    """

    SAME = {"_to_copy", "clone", "copy_", "add", "add_", "mul", "mul_", "div", "div_"}

    def __init__(self, model, r):
        super().__init__()
        self.model, self.r, self.left, self.sums, self.memory = model, r, 0.0, 0, {}

    def follow(self, x):
        self.memory[x.untyped_storage().data_ptr()] = x  # kept, so the address is not used again
        left = (x.float() @ self.r).abs() / x.float().norm(dim=-1)
        self.left = max(self.left, left.max().item())

    def follows(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in self.SAME and any(map(self.follows, args)) and out.shape[-1:] == self.r.shape:
            scales = any(not isinstance(x, torch.Tensor) or x.numel() == 1 for x in args)
            if name[:3] not in ("mul", "div") or scales:
                self.follow(out)
                self.sums += name.startswith("add")
        return out

    def see(self, layer, x):
        assert layer == 0 or self.follows(x), f"block {layer} reads no sum that holds the stream"
        self.follow(x)

    def run(self, inputs):
        with R.reading(self.model, self.see):
            for ids in inputs:
                with self:
                    self.model(ids)
        assert self.sums >= len(inputs) * len(R.blocks(self.model)), "some block added nothing"
        return self.left


def apart(a, b):
    """The greatest difference of two lists of logits, relative to the greatest (where above 1)."""
    return max((x - y).abs().max().item() / max(1, y.abs().max().item()) for x, y in zip(a, b))


def gap(a, b):
    """The typical relative distance: the median over tokens (some go to another expert)."""
    gaps = [((x - y).norm(dim=-1) / y.norm(dim=-1)).flatten() for x, y in zip(a, b)]
    return torch.cat(gaps).median().item()


def project_plainly(before, after, r):
    """The baseline where norms write: W - r r^T W, with r alone, along the axis that was edited."""
    for axis in range(before.ndim):
        if before.shape[axis] == len(r):
            rows = (after - before).movedim(axis, -1).reshape(-1, len(r))  # all along one vector?
            one = R.unit(rows[rows.norm(dim=1).argmax()])
            if R.project_out(rows, one).norm() < 1e-2 * rows.norm():
                return R.project_out(before.movedim(axis, -1), r).movedim(-1, axis)
    raise AssertionError("the change to a weight is not of the form w (u^T W)")


def unknown(verdict, note):
    return SimpleNamespace(verdict=verdict, gap=math.nan, plain=math.nan, note=note)


@torch.no_grad()
def check_padding(model):
    """Rows of a left-padded batch, read and measured, against each row alone, with nothing said."""
    ids, lengths = torch.randint(3, 100, (3, 9)), (9, 5, 7)
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()

    def measure(part, forward):
        seen = []
        with R.reading(model, lambda layer, x: seen.append(x[:, -1])):
            logits = forward(part)[:, -1]
        return torch.cat([logits, *(x for x in seen if x.ndim == 2)], dim=1)  # one stream or none

    measured = lambda part: measure(part, lambda part: R.forward(model, part))
    together = R.run_batches(measured, model, {"input_ids": ids * mask, "attention_mask": mask})
    for row, n, got in zip(ids, lengths, together):
        alone = measure(row[None, -n:], lambda ids: model(input_ids=ids).logits)
        assert apart([got], alone) < 1e-4, "padding changes what is measured"


@torch.no_grad()
def prove(model):
    """Every claim of sections 3, 5 and 8, for one model: AssertionError, or its verdict."""
    g = torch.Generator().manual_seed(0)
    r = R.unit(torch.randn(model.config.get_text_config(decoder=True).hidden_size, generator=g))
    inputs = [torch.randint(3, 100, shape, generator=g) for shape in ((2, 9), (1, 72))]
    logits = lambda: [model(ids).logits for ids in inputs]  # 72: past a sliding window of 64
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))
    greedy = lambda cache: model.generate(
        inputs[1], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache).tolist()
    base, result = logits(), unknown("refused", "")
    try:
        with R.ablate(model, 3 * r):
            assert Sums(model, r).run(inputs) < 1e-4, "ablate leaves r in the stream"
            ablated, odd = logits(), greedy(True) != greedy(False)
    except R.CannotDo as refusal:
        result.note = str(refusal)
    assert same(logits(), base), "ablate leaves something behind"
    if not re.search("run once|no list", result.note):  # else there are no layers to read
        check_padding(model)
    if result.note:
        return result
    assert apart(ablated, base) > 1e-3, "ablate does nothing"
    assert not odd or greedy(True) != greedy(False), "a cache changes replies only when ablated"
    prove_add(model, r, inputs[0])
    assert same(logits(), base), "add leaves something behind"
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        edited = prove_orthogonalize(model, r, inputs, old)
    except R.CannotDo as refusal:
        result.note = f"weights only: {refusal}"
        return result
    orthogonal = logits()
    result.note = "sees padding" * R.padding_is_seen(model)
    result.verdict, result.gap = "exact", apart(orthogonal, ablated)
    if result.gap > 1e-4:  # a norm writes: near, and nearer than with r alone (or it has no gain)
        for name in edited:
            p = model.state_dict()[name]
            p.copy_(project_plainly(old[name], p, r))
        ours, plain = gap(orthogonal, ablated), gap(logits(), ablated)
        result.verdict, result.gap, result.plain = "near", ours, plain
        assert ours < 0.05 and (ours < plain / 3 or math.isclose(ours, plain, rel_tol=1e-3)), result
    return result


def prove_add(model, r, ids):
    """Exactly coefficient * vector, at its layer."""

    def streams():
        seen = []
        with R.reading(model, lambda layer, x: seen.append(x)):
            model(ids)
        return seen

    before, last = streams(), len(R.blocks(model)) - 1
    for layer in {0, last}:
        with R.add(model, 5 * r, layer, -0.3):
            after = streams()
        assert torch.equal(after[layer], before[layer] - 0.3 * (5 * r)), "add adds something else"
        assert all(map(torch.equal, after[:layer], before[:layer])), "add comes too early"
        assert not torch.equal(after[-1], before[-1]), "add does nothing"


def prove_orthogonalize(model, r, inputs, old):
    """r-free, only the listed weights edited, tied heads untied, and on disk as in memory."""
    edited = R.orthogonalize(model, 3 * r)
    assert Sums(model, r).run(inputs) < 1e-4, "orthogonalize leaves r in the stream"
    new = model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert new.keys() == old.keys() and set(edited) == changed, f"listed {edited}: {changed}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    for ids in inputs:
        assert apart(again(ids).logits, model(ids).logits) < 1e-5, "what is saved is another model"
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert not tied, "the saved head is tied again"
    return edited


def expected(name):
    return "near" if name in NEAR else "refused" if name in REFUSED else "exact"


@census_mark
@pytest.mark.parametrize("architecture", NAMES if "census" in sys.argv else DOZEN)
def test_architecture(architecture):
    try:
        model = tiny_of(architecture)
    except KeyError:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    result = prove(model)
    assert result.verdict == expected(architecture), result
    if result.verdict == "refused":  # in one sentence that says where
        assert re.search("block|embeddings|writes to the stream", result.note), result


SEES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=14)  # fmt: skip
ROPES = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])
WRAPPERS = {  # a decoder as one part, and other blocks before it that are as many
    "Gemma3": ("gemma3_text", {}, dict(vision_config=SEES, mm_tokens_per_image=4)),
    "Llava": ("llama", {}, dict(vision_config=SEES | {"model_type": "clip_vision_model"})),
    "Qwen2VL": ("qwen2", {"model_type": "qwen2_vl_text", "rope_parameters": ROPES}, dict(
        vision_config=dict(depth=3, embed_dim=32, hidden_size=48, num_heads=2, patch_size=14))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_chat_model_inside_a_vision_model(name):
    text, change, more = WRAPPERS[name]
    text = tiny_of(text).config.to_dict() | change
    config = getattr(transformers, f"{name}Config")(text_config=text, image_token_id=101, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        randomise(model.requires_grad_(False))
    assert prove(model).verdict == ("near" if name == "Gemma3" else "exact")


def census(*names):
    """Print family | verdict | logit gap | note for every family (or those named)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started, count, wrong = time.time(), collections.Counter(), 0
    print(f"{'family':<28}{'verdict':<10}{'gap':<9}{'r alone':<9}note")
    for name in names or NAMES:
        try:
            result = prove(tiny_of(name))
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            result = unknown("WRONG", note)
        odd = result.verdict != expected(name)
        wrong, count[result.verdict] = wrong + odd, count[result.verdict] + 1
        note = f"EXPECTED {expected(name)}! " * odd + result.note
        numbers = f"{result.gap:<9.1e}{result.plain:<9.1e}"
        print(f"{name:<28}{result.verdict:<10}{numbers}{note}", flush=True)
    print(*(f"{n} {kind}" for kind, n in count.items()), f"{time.time() - started:.0f} s", sep=", ")
    return int(wrong > 0)


# %% python test_refusal.py bench [--model FOLDER]: what the search costs --------------------------


def timed(model, work):
    """Run work(): (seconds, rows and tokens that entered the first block), and the result."""
    count, start = torch.zeros(2), time.perf_counter()

    def see(module, args):
        count.add_(torch.tensor([args[0].shape[0], args[0].shape[:2].numel()]))

    with R.blocks(model)[0].register_forward_pre_hook(see):
        result = work()
    return torch.tensor([time.perf_counter() - start, *count.tolist()]), result


def bench(flag="--model", folder="tiny"):
    """The cost of refusal.py's search beside that of the plain procedure, on the same prompts."""
    model, tokenizer = tools = R.load_model(folder)
    data = split_of(40, 8, 1)
    R.writers(model), R.padding_is_seen(model)  # found once a model
    train, val = ([getattr(data[kind], part) for kind in KINDS] for part in ("train", "val"))
    means, pair = timed(model, lambda: [R.mean_activations(*tools, prompts) for prompts in train])
    r = R.refusal_directions(*pair)
    search, chosen = timed(model, lambda: R.select_direction(*tools, r, *val))
    best, places = (chosen.position, chosen.layer), torch.ones(r.shape[:2]).nonzero().tolist()
    some = list(map(tuple, places))
    if folder != "tiny":  # the winner, and three of the others
        some = [best, *some[len(some) // 6 :: len(some) // 3]]
    plain, _ = timed(model, lambda: [plain_means(*tools, prompts) for prompts in train])
    sweeps, (scores, winner) = timed(model, lambda: plain_select(*tools, r, *val, only=some))
    plain = plain + sweeps * len(places) / len(some)
    print(f"{folder}: {model.dtype}, 40 + 8 prompts of each kind; the plain procedure's sweep over "
          f"{len(some)} of {len(places)} candidates, extrapolated to all")
    print(f"winner {best}; of those that the plain procedure swept: {winner}")
    print(f"{'':<12}{'seconds':>10}{'rows':>10}{'tokens':>10}")
    ours = means + search
    for name, row in (("plain", plain), ("refusal.py", ours), ("times", plain / ours)):
        print(f"{name:<12}" + "".join(f"{x:>10.1f}" for x in row.tolist()))
    for name, table in scores.items():
        gaps = (chosen.scores[name] - table).abs()
        print(f"{name}: {gaps.isfinite().sum()} by both, {gaps.nan_to_num().max():.0e} apart")


if "REFUSAL" in os.environ:  # grading a student: nothing but the exercises
    for name in [name for name in globals() if re.match("test_(?!exercise_)", name)]:
        del globals()[name]

if PROGRAM:
    usage = ("python test_refusal.py blank FILE | status [FILE] | hint EXERCISE [NUMBER] | census "
             "[NAME ...] | bench [--model FOLDER]")
    tools = dict(blank=write_blank, hint=hint, status=status, census=census, bench=bench)
    tool, *rest = [*sys.argv[1:], ""]
    known = tool in tools and (tool not in ("blank", "hint") or rest[0])
    sys.exit(tools[tool](*rest[:-1]) if known else f"usage: {usage}")
