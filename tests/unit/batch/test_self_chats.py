# SPDX-License-Identifier: Apache-2.0
"""Catch chats that the model did not write, that a test set holds, or that depend on a run's way.

A function stands for the engine: it answers in any order, in parts, or until it is killed.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest

from unit.batch.batch_jobs import write_rows
from unit.chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL, PLAIN, QWEN3, R1, TEMPLATES
from unit.chat_templates import tokenizer_with as tokenizer_of
from vllm_layerskip.batch import one_engine, self_chats, self_chats_tries
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.self_chats import Sampling, SelfChatsSettings, excluded_keys
from vllm_layerskip.batch.self_chats_tries import (
    CHANGED,
    EMPTY,
    EXCLUDED,
    FAILED,
    NO_ANSWER,
    REPEATED,
    SPECIAL,
    UNCLOSED,
    UNFINISHED,
)
from vllm_layerskip.batch.self_chats_turn import user_turn
from vllm_layerskip.batch.settings import EngineSettings
from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.errors import UserError

CLOSES = {"llama3": "<|eot_id|>", "mistral": "[/INST]", "gemma": "<end_of_turn>", "phi3": "<|end|>",
          "r1": "<|Assistant|>"}  # fmt: skip
"""What ends a user's turn, where it is not <|im_end|>."""


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"plain"}))
def test_a_question_stands_between_its_prefix_and_its_close(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    turn = user_turn(tokenizer)
    close = CLOSES.get(name, "<|im_end|>")
    assert turn.close == tokenizer.convert_tokens_to_ids(close)
    assert turn.close in turn.special
    ids = chat_token_ids(tokenizer, [{"role": "user", "content": "import os"}])
    assert tuple(ids[: len(turn.prefix)]) == turn.prefix
    question, closed, _ = tokenizer.decode(ids[len(turn.prefix) :]).partition(close)
    assert (question.strip(), closed) == ("import os", close)


def test_the_prefix_ends_before_a_blank_that_is_part_of_the_first_word():
    """A model never saw "[INST] " with the blank as a token of its own."""
    tokenizer = tokenizer_of(MISTRAL)
    assert tokenizer.decode(user_turn(tokenizer).prefix).endswith("[INST]")


def test_the_prefix_has_the_system_prompt():
    tokenizer = tokenizer_of(CHATML)
    assert "You are a model." in tokenizer.decode(user_turn(tokenizer).prefix)
    assert "Be brief." in tokenizer.decode(user_turn(tokenizer, "Be brief.").prefix)


WITH = "{%- for m in messages %}{{ WHAT }}{%- endfor %}"


@pytest.mark.parametrize(
    ("template", "system", "error"),
    [
        (PLAIN, None, "closes a user's message with no token of its own"),
        (GEMMA, "Be brief.", "refuses these messages"),
        ("", None, "no chat template"),
        (WITH.replace("WHAT", "'<|user|>' + m.content | upper"), None, "as it is"),
        (WITH.replace("WHAT", "'<|user|>' + m.content + m.content"), None, "once"),
        (WITH.replace("WHAT", "m.content + '<|end|>'"), None, "nothing before"),
        (
            WITH.replace("WHAT", "'<|user|>Q: ' + m.content + ' Be brief.<|end|>'"),
            None,
            "a text of its own ('Be brief.')",
        ),
    ],
)
def test_a_template_that_cannot_do_it_is_one_line(template, system, error, tmp_path, monkeypatch):
    monkeypatch.setattr(self_chats, "load_tokenizer", lambda *_: tokenizer_of(template))
    with pytest.raises(UserError) as raised:
        self_chats.self_chats(settings(tmp_path, sampling=Sampling(system=system)))
    assert str(raised.value).startswith("--model m")
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (system is None) or "--system 'Be brief.'" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# Jobs.


def settings(folder, num_chats=4, **changes):
    engine = EngineSettings("m", speculation=False, device="cpu")
    return SelfChatsSettings(folder / "chats.jsonl", num_chats, engine, **changes)


class Model:
    """Asks what a list says, by the number of the try, and answers "re: " and the question.

    A question is its text, or what is wrong with it. ``answers`` has other ones.
    """

    def __init__(self, tokenizer, questions, answers=None, die_after=None, order=None):
        self.tokenizer = tokenizer
        self.turn = user_turn(tokenizer)
        self.questions, self.others = questions, answers or {}
        self.die_after, self.order = die_after, order or random.Random(0)
        self.asked: list[int] = []
        self.rows = {}

    def __call__(self, rows, settings):
        """As ``one_engine``: some requests are under way, and one of them ends."""
        waiting, pending = iter(rows), []
        while True:
            while len(pending) < 3 and (row := next(waiting, None)) is not None:
                pending.append(row)
            if not pending:
                return
            if self.die_after is not None and len(self.asked) == self.die_after:
                raise RuntimeError("killed")
            row = pending.pop(self.order.randrange(len(pending)))
            self.asked.append(row.index)
            self.rows[row.index] = row
            yield self.answer(row)

    def answer(self, row):
        if row.index % 2:
            text = row.messages[-1]["content"]
            return self.others.get(text, lambda index: good(index, f"re: {text}"))(row.index)
        assert row.prompt_token_ids == self.turn.prefix
        assert row.sampling_params["stop_token_ids"] == [self.turn.close]
        question = self.questions[row.index // 2 % len(self.questions)]
        if callable(question):
            return question(row.index)
        return good(row.index, question, (7, self.turn.close))


def good(index, text, ids=(7, 8)):
    return Answer(index, text, ids, "stop", 3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(model, **settings)``: the summary and the rows."""

    def run(model, num_chats=4, **changes):
        monkeypatch.setattr(self_chats, "load_tokenizer", lambda *_: model.tokenizer)
        monkeypatch.setattr(one_engine, "answers", lambda rows, settings: model(rows, settings))
        summary = self_chats.self_chats(settings(tmp_path, num_chats, **changes))
        lines = (tmp_path / "chats.jsonl").read_text().splitlines()
        return summary, [json.loads(line) for line in lines]

    return run


CHAT = tokenizer_of(CHATML)


def questions_of(rows):
    return [row["messages"][-2]["content"] for row in rows]


def test_chats_in_the_order_of_their_tries(run):
    summary, rows = run(Model(CHAT, [" one\n", "two", "three", "four"]))
    assert questions_of(rows) == ["one", "two", "three", "four"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "re: one"},
    ]
    assert [row["finish_reason"] for row in rows] == ["stop"] * 4
    assert rows[1]["text"] == CHAT.apply_chat_template(rows[1]["messages"], tokenize=False)
    assert (summary.num_chats, summary.num_questions, summary.dropped) == (4, 4, {})
    assert (summary.num_answer_tokens, summary.num_tokens_of_this_run) == (8, 16)
    assert summary.note is None


def test_a_system_prompt_is_part_of_the_chat(run):
    class Other(Model):
        def __init__(self):
            super().__init__(CHAT, ["one", "two"])
            self.turn = user_turn(CHAT, "Be brief.")

    model = Other()
    _, rows = run(model, 1, sampling=Sampling(system="Be brief."))
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert model.rows[1].messages == tuple(rows[0]["messages"][:-1])


def cut(index):
    return Answer(index, "cut of", (7, 8), "length", 3)


def refused(index):
    return Answer(index, error="ValueError: too long")


CLOSE = user_turn(CHAT).close
HEADER = CHAT.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (cut, UNCLOSED),
        (refused, FAILED),
        (" \n", EMPTY),
        ("Test \n SET", EXCLUDED),
        ("one", REPEATED),
        (" ONE ", REPEATED),
        (lambda index: good(index, "ends as a document", (7, 1)), UNCLOSED),
        (lambda index: good(index, "asks and answers", (7, HEADER, 8, CLOSE)), SPECIAL),
        ("unfinished", UNFINISHED),
        ("in vain", NO_ANSWER),
        ("refused", FAILED),
    ],
)
def test_a_bad_try_is_counted_and_made_up_for(question, reason, run, tmp_path):
    answers = {
        "unfinished": cut,
        "in vain": lambda index: good(index, " "),
        "refused": refused,
    }
    held_out = write_rows(tmp_path / "t.jsonl", {"prompt": "test set"})
    model = Model(CHAT, ["one", question, "two", "three"], answers)
    summary, rows = run(model, 3, exclude=[str(held_out)])
    assert questions_of(rows) == ["one", "two", "three"]
    assert summary.dropped == {reason: 1}
    assert summary.num_questions == 4


def test_an_answer_that_the_template_hides_is_dropped(run):
    """R1's leaves out reasoning: drafts would learn from texts that the model does not write."""

    def reasoned(index):
        return good(index, "Well...</think>Yes.")

    model = Model(tokenizer_of(R1), ["one", "two"], {"one": reasoned})
    summary, rows = run(model, 1)
    assert questions_of(rows) == ["two"]
    assert summary.dropped == {CHANGED: 1}


def test_unfinished_answers_are_kept_if_asked(run):
    def cut_in_a_character(index):
        return replace(cut(index), text="cut of\ufffd")

    model = Model(CHAT, ["one", "two"], {"one": cut_in_a_character})
    summary, rows = run(model, 2, keep_unfinished=True)
    assert [row["finish_reason"] for row in rows] == ["length", "stop"]
    assert rows[0]["messages"][-1]["content"] == "cut of"
    assert rows[0]["text"].endswith("assistant\ncut of"), "the model did not close it"
    assert summary.num_unfinished == 1


QUESTIONS = ["a", cut, "b", "A", "", "c", "d", "b", "e", cut, "f", "g", "h", "i"]


@pytest.mark.parametrize("seed", range(8))
def test_the_order_in_which_requests_end_changes_nothing(seed, run):
    model = Model(CHAT, QUESTIONS, {"d": cut}, order=random.Random(seed))
    summary, rows = run(model, 6)
    assert questions_of(rows) == ["a", "b", "c", "e", "f", "g"]
    assert summary.num_questions == 12, "no more than needed"
    assert len(set(model.asked)) == len(model.asked)


@pytest.mark.parametrize("die_after", range(1, 19, 3))
def test_an_interrupted_run_goes_on(die_after, run, tmp_path):
    dies = Model(CHAT, QUESTIONS, {"d": cut}, die_after)
    with pytest.raises(RuntimeError):
        run(dies, 6)
    assert not (tmp_path / "chats.jsonl").exists()
    goes_on = Model(CHAT, QUESTIONS, {"d": cut}, order=random.Random(5))
    summary, rows = run(goes_on, 6)
    assert questions_of(rows) == ["a", "b", "c", "e", "f", "g"]
    assert summary.num_questions == 12
    assert not set(dies.asked) & set(goes_on.asked)
    # And a third one has nothing to do.
    again, same = run(Model(CHAT, QUESTIONS, die_after=0), 6)
    assert same == rows
    assert again.num_tokens_of_this_run == 0


def test_what_is_selected_may_change(run, tmp_path):
    answers = {"d": cut}
    run(Model(CHAT, QUESTIONS, answers), 2)
    more = Model(CHAT, QUESTIONS, answers)
    _, rows = run(more, 4, keep_unfinished=True)
    assert questions_of(rows) == ["a", "b", "c", "d"]
    assert 0 not in more.asked
    held_out = write_rows(tmp_path / "t.jsonl", '"B"')
    _, rows = run(Model(CHAT, QUESTIONS, answers), 2, exclude=[str(held_out)])
    assert questions_of(rows) == ["a", "c"]


def test_other_settings_are_refused_and_overwritten_if_asked(run):
    _, first = run(Model(CHAT, QUESTIONS), 2)
    other = {"sampling": Sampling(seed=1)}
    with pytest.raises(UserError, match=r"chats\.jsonl\.run holds answers of a run with other"):
        run(Model(CHAT, QUESTIONS), 2, **other)
    _, rows = run(Model(CHAT, ["x", "y"]), 2, **other, overwrite=True)
    assert questions_of(rows) == ["x", "y"]


def test_a_file_of_somebody_else_is_not_replaced(run, tmp_path):
    (tmp_path / "chats.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="it is there already"):
        run(Model(CHAT, QUESTIONS))
    assert (tmp_path / "chats.jsonl").read_text() == "mine\n"
    _, rows = run(Model(CHAT, QUESTIONS), overwrite=True)
    assert len(rows) == 4


@pytest.mark.parametrize("name", ["chats.txt", "chats", "chats.parquet"])
def test_a_name_that_train_would_not_read_as_json_lines(name, tmp_path):
    with pytest.raises(UserError, match=r"--output .*: its name must end with \.jsonl"):
        self_chats.self_chats(replace(settings(tmp_path), output=tmp_path / name))


def test_a_model_that_cannot_ask_is_given_up(run, tmp_path):
    model = Model(CHAT, [cut])
    with pytest.raises(UserError) as raised:
        run(model, 1000)
    assert len(model.asked) == self_chats_tries.FIRST_TRIES
    assert f"none of 100 questions gave a chat: 100 {UNCLOSED}. A base" in str(raised.value)
    assert not (tmp_path / "chats.jsonl").exists()


def test_an_engine_that_refuses_all_is_quoted(run):
    with pytest.raises(UserError, match=r"It said: ValueError: too long Correct"):
        run(Model(CHAT, [refused]))


def test_a_model_that_repeats_itself_gives_what_it_can(run):
    summary, rows = run(Model(CHAT, ["one", "two"]), 3)
    assert questions_of(rows) == ["one", "two"]
    assert summary.num_questions == 100 + 2 * 10
    assert summary.note.startswith("Only 2 of 3 chats: sampling ended after 120 questions")
    assert "Raise --temperature" in summary.note


@pytest.fixture
def clock(monkeypatch):
    """The job's clock: a minute for each answer of a ``Model``."""
    now = SimpleNamespace(minutes=0)
    fake = SimpleNamespace(perf_counter=lambda: 60.0 * now.minutes)
    monkeypatch.setattr(self_chats, "time", fake)
    answer = Model.answer

    def in_a_minute(model, row):
        now.minutes += 1
        return answer(model, row)

    monkeypatch.setattr(Model, "answer", in_a_minute)
    return now


def test_time_ends_it_with_the_chats_that_are_there(run, clock, tmp_path):
    """Nothing was dropped: there is no reason to tell but the time."""
    model = Model(CHAT, [f"question {number}" for number in range(300)])
    summary, rows = run(model, 200, max_minutes=150)
    assert 0 < summary.num_chats == len(rows) < 100
    assert len(model.asked) == 151, "the first answer after the time is the last one"
    assert summary.note == (
        f"Only {len(rows)} of 200 chats: the time of --max-minutes 150 was over. The same command "
        "goes on from there."
    )
    assert summary.num_questions == sum(index % 2 == 0 for index in model.asked)
    assert summary.dropped == {}
    assert (tmp_path / "chats.jsonl.run" / "answers.jsonl").exists()
    assert json.loads((tmp_path / "chats.jsonl.run" / "summary.json").read_text())["note"]


def test_with_drops_it_is_the_time_all_the_same(run, clock):
    summary, _ = run(Model(CHAT, QUESTIONS), 10, max_minutes=12)
    assert summary.dropped
    assert "the time of --max-minutes 12 was over" in summary.note
    assert "sampling ended" not in summary.note


@pytest.mark.parametrize("max_minutes", [4, 9, 14])
def test_a_run_that_the_time_ended_goes_on(max_minutes, run, clock):
    ended = Model(CHAT, QUESTIONS, {"d": cut})
    run(ended, 6, max_minutes=max_minutes)
    goes_on = Model(CHAT, QUESTIONS, {"d": cut}, order=random.Random(5))
    summary, rows = run(goes_on, 6, max_minutes=90)
    assert questions_of(rows) == ["a", "b", "c", "e", "f", "g"]
    assert (summary.num_questions, summary.note) == (12, None)
    assert not set(ended.asked) & set(goes_on.asked)


def test_no_chat_in_time(run, clock, tmp_path):
    model = Model(CHAT, [cut, "one"])
    with pytest.raises(UserError) as raised:
        run(model, 4, max_minutes=0.5)
    assert str(raised.value).startswith(
        "the time of --max-minutes 0.5 was over before there was a chat (questions: 1, dropped: "
    )
    assert not (tmp_path / "chats.jsonl").exists()
    _, rows = run(Model(CHAT, [cut, "one"]), 1)
    assert questions_of(rows) == ["one"], "what was written is kept"


def test_a_model_that_is_given_up_with_the_last_answer_in_time(run, clock):
    """The time is over, and more of it would give nothing."""
    with pytest.raises(UserError, match="none of 100 questions gave a chat"):
        run(Model(CHAT, [cut]), 1000, max_minutes=99.5)


def test_an_engine_that_ends_early(run):
    class Ends(Model):
        def __call__(self, rows, settings):
            yield from islice(super().__call__(rows, settings), 9)

    summary, rows = run(Ends(CHAT, QUESTIONS), 9)
    assert rows
    assert summary.note.startswith(f"Only {len(rows)} of 9 chats: the engine ended. The same")


def test_a_whole_test_set_of_the_same_seed_is_passed_over(run, tmp_path):
    questions = [f"question {number}" for number in range(300)]
    held_out = write_rows(tmp_path / "t.jsonl", *map(json.dumps, questions[:250]))
    summary, rows = run(Model(CHAT, questions), 5, exclude=[str(held_out)])
    assert questions_of(rows) == questions[250:255]
    assert summary.dropped == {EXCLUDED: 250}


def test_a_model_that_knows_only_a_test_set_is_given_up(run, tmp_path):
    held_out = write_rows(tmp_path / "t.jsonl", '"one"')
    model = Model(CHAT, ["one"])
    with pytest.raises(UserError, match=f"100 {REPEATED}, 1 {EXCLUDED}"):
        run(model, 5, exclude=[str(held_out)])
    assert len(model.asked) == 101


def test_each_request_has_a_seed_of_its_own(run):
    model, other = Model(CHAT, QUESTIONS), Model(CHAT, QUESTIONS)
    run(model, 3)
    run(other, 3, sampling=Sampling(seed=1, answer_temperature=0.5), overwrite=True)
    questions = {row.sampling_params["seed"] for i, row in model.rows.items() if i % 2 == 0}
    assert len(questions) == sum(i % 2 == 0 for i in model.rows)
    assert {row.sampling_params["seed"] for i, row in model.rows.items() if i % 2} == {None}
    others = {row.sampling_params["seed"] for row in other.rows.values()}
    assert len(others) == len(other.rows)
    assert not questions & others
    assert all(0 <= seed < 2**63 for seed in questions | others)


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, GEMMA, QWEN3])
def test_train_reads_the_rows_and_learns_the_answers(template, run):
    from vllm_layerskip.training.config import DataConfig, Source
    from vllm_layerskip.training.encoder import Encoder
    from vllm_layerskip.training.loss import IGNORED

    tokenizer = tokenizer_of(template)
    _, (row,) = run(Model(tokenizer, ["one"]), 1)
    source = Source(files=("x.jsonl",))
    encoded = Encoder(tokenizer, DataConfig(train=source, seq_len=64)).encode(row, "here")
    learned = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    assert "re: one" in learned
    assert "user" not in learned


def test_eval_reads_the_rows(run, tmp_path):
    from vllm_layerskip.evaluation.data import read_documents

    run(Model(CHAT, ["one", "two"]), 2)
    documents = read_documents([str(tmp_path / "chats.jsonl")], "text")
    assert ["re: one" in documents[0].text, "re: two" in documents[1].text] == [True, True]


WHAT = "What is it?"


@pytest.mark.parametrize(
    "record",
    [
        WHAT,
        {"prompt": "What is it?"},
        {"text": "what  is it?"},
        {"question_id": 1, "turns": ["What is it?", "And why?"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": WHAT}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]},
        {"body": {"messages": [{"role": "user", "content": "What is it?"}]}},
    ],
)  # fmt: skip
def test_questions_of_a_test_set(record, tmp_path):
    file = write_rows(tmp_path / "t.jsonl", json.dumps(record))
    keys = excluded_keys([str(file)])
    assert "what is it?" in keys
    assert "s" not in keys


@pytest.mark.parametrize("record", [{"id": 1}, {"messages": [{"role": "assistant"}]}, 7, ""])
def test_a_test_set_without_questions_is_an_error(record, tmp_path):
    file = write_rows(tmp_path / "t.jsonl", json.dumps(record))
    with pytest.raises(UserError, match=r"--exclude .*line 1: there is no question"):
        excluded_keys([str(file)])


def test_the_engines_loop_asks_again_after_an_end(monkeypatch):
    """``Tries.rows`` relies on it."""

    class Engine:
        def __init__(self):
            scheduler = SimpleNamespace(max_num_seqs=2)
            self.vllm_config = SimpleNamespace(scheduler_config=scheduler)
            self.engine_core, self.pending = self, []

        def add_request(self, request_id, prompt, params):
            self.pending.append(request_id)

        def step(self):
            name = self.pending.pop(0)
            completion = SimpleNamespace(text="a", token_ids=[1], finish_reason="stop")
            return [
                SimpleNamespace(
                    finished=True, request_id=name, prompt_token_ids=[1], outputs=[completion]
                )
            ]

        def shutdown(self):
            pass

    engine = Engine()
    monkeypatch.setattr("vllm.LLM", lambda **_: SimpleNamespace(llm_engine=engine))
    asked = self_chats_tries.Asked(user_turn(CHAT))
    tries = self_chats_tries.Tries(asked, 1, lambda index: None, lambda *_: True)
    given = self_chats._WrittenSettings("m", None, {}, {})
    seen = []
    for answer in one_engine.answers(tries.rows(), given):
        seen.append(answer.index)
        tries.take(answer)
    assert seen == list(range(0, 200, 2)), "no question closes: each failure asks another"
