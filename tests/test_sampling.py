"Sampling and the calculator: what does not read well as a notebook cell."
import random, time, warnings
import pytest, torch
from nanochat_nb.engine import N_FORCED
from nanochat_nb.sampling import calculate, cut, forced_by, sample
from nanochat_nb.tokenizer import SPECIAL, train_tokenizer
from nanochat_nb.world import World, conversations

@pytest.fixture(scope="module")
def tok(): return train_tokenizer([f"{i}+{j} 等于几 how much is it 你好世界 hello" for i in range(10) for j in range(10)], 300)

def test_random_expressions_never_raise():
    rng = random.Random(0)
    alphabet = list("0123456789.+-*/%()[]\"' ,") + ["count", "len", ".count(", '"aba"', "len(", "__", "x", "，", "\0", "\ud800"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20_000):
            r = calculate("".join(rng.choices(alphabet, k=rng.randint(1, 12))))
            assert r is None or (isinstance(r, str) and len(r) <= 40)

def test_calculator_agrees_with_python():
    rng = random.Random(1)
    for _ in range(2000):
        a, b, c = (rng.randint(-999, 999) for _ in "abc")
        assert calculate(f"({a})+({b})*({c})") == str(a + b * c)
        assert calculate(f"({a})-({b})-({c})") == str(a - b - c)
        if c: assert (calculate(f"({a})//({c})"), calculate(f"({a})%({c})")) == (str(a // c), str(a % c))
        if c: assert float(calculate(f"({a})/({c})")) == pytest.approx(a / c, abs=1e-9)
        x = f"{rng.randrange(10**17)}.{rng.randrange(10**9)}1"                 # more digits than a float holds
        assert calculate(f"{x}-1+1") == calculate(x) == x

def test_calculator_is_quick_on_the_worst_input():
    t = time.perf_counter()
    for e in ("(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "9*" * 99 + "9", '"' * 199, "len(" * 49 + '""' + ")" * 49,
              "9" * 10**6, '"' * 10**6, "len" * 10**5, "(" * 10**6):
        calculate(e)
    assert time.perf_counter() - t < 1

def test_calculator_agrees_with_the_world():
    parts = [m["content"] for c in conversations(World(), 3000) for m in c["messages"] if isinstance(m["content"], list)]
    calls = [(a["text"], b["text"]) for ps in parts for a, b in zip(ps, ps[1:]) if a["type"] == "python"]
    assert len(calls) > 300 and [calculate(e) for e, _ in calls] == [r for _, r in calls]


def test_forced_tokens(tok):
    S, E, O, X = map(tok.special, ("python_start", "python_end", "output_start", "output_end"))
    a, three = tok.encode("1+2"), [O, *tok.encode("3"), X]
    assert forced_by(tok, [S, *a, E]) == forced_by(tok, [7, S, S, *a, E]) == three
    assert forced_by(tok, [S, *a, E, *three, S, *a, E]) == three                                    # a second call
    for row in ([], [E], [*a, E], [S, *a], [S, *a, E, 5], [S, *a, E, E]): assert forced_by(tok, row) == []
    assert tok.decode(forced_by(tok, [S, *tok.encode("2**9"), E])) == "<|output_start|>error<|output_end|>"

def test_an_output_can_never_become_a_special_token(tok):
    S, E = tok.special("python_start"), tok.special("python_end")
    out = forced_by(tok, [S, *tok.encode('"' + "".join(SPECIAL) + '"[0]'), E])
    assert tok.decode(out[1:-1]) == "<" and not set(out[1:-1]) & tok.special_ids

def test_no_result_outgrows_the_queue(tok):
    S, E = tok.special("python_start"), tok.special("python_end")
    for e in ("(0-123456789012345678+1/3)", "0-999999999999999999/7", "1/0", '"𝄞"[0]', "-" * 9):
        assert len(forced_by(tok, [S, *tok.encode(e), E])) < N_FORCED

def test_cuts_are_those_of_transformers():
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    for k, p in ((1, 1.), (5, 1.), (40, .3), (40, .9), (7, .5), (40, .01)):
        want = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, x)) if p < 1 else TopKLogitsWarper(k)(None, x)
        assert torch.equal(cut(x, torch.full((50,), k), torch.full((50,), p)), want)

def test_the_likeliest_token_is_never_cut():
    x, row = torch.tensor([[0., 2., 1.]]), torch.ones(1, dtype=torch.long)
    for k, p in ((0, None), (-3, None), (None, 0.), (None, -1.), (-3, -1.)):
        got = cut(x, *(None if v is None else torch.tensor([v]) for v in (k, p)))
        assert got.tolist() == [[-torch.inf, 2, -torch.inf]] and sample(x, 1., k, p, row, row).tolist() == [1]
    assert cut(torch.tensor([[1., 1., 1., 0.]]), row).tolist() == [[1, 1, 1, -torch.inf]]   # ties stay together

def test_a_cut_at_one_cuts_nothing():
    "Or a row's draw would depend on whether another row of its batch asked for a cut."
    x = torch.tensor([[20., 0., -5.]])
    assert torch.equal(cut(x, torch.tensor([3]), torch.tensor([1.])), x)

def test_draws_follow_the_distribution():
    "Chi-square over 20,000 draws: seeds in a row, and steps in a row."
    x = torch.randn(30, generator=torch.Generator().manual_seed(1))
    n, one, i = 20_000, torch.ones(20_000, dtype=torch.long), torch.arange(20_000)
    for seed, t in ((i, one), (one * 12345, i), (i * 2**16, i)):
        got = torch.bincount(sample(x.expand(n, -1), 1.0, seed=seed, t=t), minlength=30)
        want = n * x.softmax(-1)
        assert ((got - want)**2 / want).sum() < 29 + 5 * 58**.5

def test_a_low_temperature_is_taken_at_its_word():
    "Two tokens a twentieth apart: at a temperature of a twentieth one is e times as likely as the other."
    n, x = 20_000, torch.tensor([0., .05])
    i = torch.arange(n)
    got = sample(x.expand(n, -1), .05, seed=i, t=torch.zeros_like(i)).float().mean().item()
    assert got == pytest.approx(torch.tensor(1.).sigmoid().item(), abs=.015)

def test_results_are_bounded_on_both_sides():
    big = 10**9
    assert calculate(f"{big}*{big}") is calculate(f"-{big}*{big}") is None
    assert (calculate(f"{big}*{big - 1}"), calculate(f"-{big}*{big - 1}")) == (str(big * (big - 1)), str(-big * (big - 1)))
