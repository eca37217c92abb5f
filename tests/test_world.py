"The mini world where it does not read well as a cell: other processes, many worlds."
import os, subprocess, sys
from collections import Counter
import pytest
from nanochat_nb.sampling import calculate
from nanochat_nb.settings import NanochatError
from nanochat_nb.world import EXAMS, GIVEN, SURNAMES, TRANSLATE, World, conversations, corpus, exam

PRINT = """
import hashlib, json
from nanochat_nb.sampling import calculate
from nanochat_nb.world import EXAMS, World, conversations, corpus, exam
w = World(seed=5, n_people=40)
made = corpus(w, 20_000), conversations(w, 200), [exam(w, lang, kind, 20) for lang in ("zh", "en") for kind in EXAMS]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""

def test_every_process_makes_the_same_world():
    "Nothing may hang on the order of sets, which Python salts anew at every start."
    def one(salt): return subprocess.run([sys.executable, "-c", PRINT], env=os.environ | {"PYTHONHASHSEED": salt},
                                         capture_output=True, text=True, check=True).stdout
    assert len({one(salt) for salt in "012"}) == 1

def test_the_exam_is_the_same_whatever_was_drawn_before():
    w = World(n_people=30)
    before = exam(w, "zh", "mcq", 30)
    conversations(w, 100); corpus(w, 10_000); exam(w, "en", "mcq", 30)
    assert exam(w, "zh", "mcq", 30) == before

@pytest.mark.parametrize("seed, n_people", [(1, 8), (2, 60), (3, 700)])
def test_no_world_leaks_its_exam(seed, n_people):
    w = World(seed, n_people)
    said = {m["content"] for s in range(2) for c in conversations(w, 2000, s) for m in c["messages"] if m["role"] == "user"}
    lines = "\n".join(d["text"] for d in corpus(w, 300_000))
    for lang in ("zh", "en"):
        for kind in EXAMS:
            for x in exam(w, lang, kind, 100):
                assert x["messages"][0]["content"] not in said
                if kind == "mcq": assert x["stem"][0]["content"] not in said and x["choices"][x["label"]] not in said
                if kind in ("arithmetic", "translation"): assert x["messages"][0]["content"].removeprefix(TRANSLATE[lang]) not in lines

@pytest.mark.parametrize("n", [8, 9, len(SURNAMES) * len(GIVEN)**2 // 4])
def test_any_size_up_to_the_limit(n):
    x = World(seed=n, n_people=n)
    assert len({p.name[0] for p in x.people}) == len({p.name[1] for p in x.people}) == n
    assert (len(x.taught), len(x.examined)) == (n // 2 + 10, n - n // 2 + 10)
    assert corpus(x, 5_000) and len(exam(x, "en", "mcq", 10)) == 10 and conversations(x, 10)

def test_a_world_too_large_for_its_names():
    most = len(SURNAMES) * len(GIVEN)**2 // 4
    with pytest.raises(NanochatError, match=f"8 to {most} people"): World(n_people=most + 1)

@pytest.mark.parametrize("seed", range(4))
def test_answers_of_the_exam_are_facts_of_the_world(seed):
    w = World(seed, 50)
    facts = {(e.name[i], v[i]) for e in w.examined for v in e.facts.values() for i in (0, 1)}
    for lang in ("zh", "en"):
        for x in exam(w, lang, "mcq", 100, seed):
            right = [any(n in c and v in c for n, v in facts) for c in x["choices"]]
            assert right[x["label"]] and len(set(x["choices"])) == 4 and "ABCD"[x["label"]] == x["answer"]

@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("seed", range(3))
def test_no_constant_answer_pays(lang, seed):
    "Over two hundred different questions in every subject, and the most frequent answer is right for a quarter at most."
    w = World(n_people=60)
    for kind in EXAMS:
        paper = exam(w, lang, kind, 400, seed)
        assert len({x["messages"][0]["content"] for x in paper}) == len(paper) == 400, kind
        most = max(Counter(x["answer"] for x in paper).values())
        assert most / 400 < (0.32 if kind == "mcq" else 0.2), (kind, most)        # four letters: chance and its error

def test_counting_in_english_has_four_answers_as_often():
    answers = [x["answer"] for x in exam(World(), "en", "spelling", 400) if "How many" in x["messages"][0]["content"]]
    share = {a: n / len(answers) for a, n in Counter(answers).items()}
    assert set(share) == set("0123") and all(0.19 < s < 0.31 for s in share.values()), share

def test_the_engine_can_calculate_what_spelling_asks():
    for c in conversations(World(n_people=20), 3000):
        if c["kind"] != "spelling" or isinstance(c["messages"][1]["content"], str): continue
        call, output, said = c["messages"][1]["content"]
        assert calculate(call["text"]) == output["text"] and output["text"] in said["text"]
