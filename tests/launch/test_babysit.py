"""What the babysitter does next, over every state of a request and every end of a run."""

import pytest

from launch.tpu_vm.babysit import (
    Limits,
    Memory,
    Seen,
    Step,
    Worker,
    decide,
    read_resource,
    read_workers,
)

REVISION = "abc"
LIMITS = Limits(restarts=3, failed_requests=2, setups=2, unanswered=2, stragglers=2)


def workers(*states: str | int, revision: str = REVISION) -> tuple[Worker, ...]:
    """idle, running, or the code of one that has ended."""
    return tuple(
        Worker(f"w{n}", revision, "ended", state)
        if isinstance(state, int)
        else Worker(f"w{n}", revision, state)
        for n, state in enumerate(states)
    )


def play(looks: list[Seen], memory: Memory | None = None) -> list[Step]:
    """Steps taken at these looks, up to an end."""
    memory, steps = memory or Memory(), []
    for seen in looks:
        step, memory = decide(seen, memory, REVISION, LIMITS)
        steps.append(step)
        if step.action == "end":
            break
    return steps


def actions(looks: list[Seen], memory: Memory | None = None) -> list[str]:
    return [step.action for step in play(looks, memory)]


def active(*states: str | int, now: float = 0.0, **more) -> Seen:
    return Seen(now, "ACTIVE", workers(*states), **more)


def test_a_run_without_trouble():
    looks = [
        Seen(0, None),
        Seen(1, "CREATING"),
        Seen(2, "WAITING_FOR_RESOURCES"),
        Seen(3, "PROVISIONING"),
        Seen(4, "ACTIVE", (Worker("?", "none", "idle"),)),
        active("idle", "idle", now=5),
        active("running", "running", now=6),
        active(0, 0, now=7),
    ]
    expected = ["create", "wait", "wait", "wait", "setup", "start", "wait", "end"]
    assert actions(looks) == expected
    assert play(looks)[-1].code == 0


def test_preempted_slices_are_asked_for_again_and_the_run_goes_on():
    looks = [
        active("running", "running"),
        Seen(1, "SUSPENDING"),
        Seen(2, "SUSPENDED"),
        Seen(3, "DELETING"),
        Seen(4, None),
        Seen(5, "PROVISIONING"),
        Seen(6, "ACTIVE", (Worker("?", "none", "idle"),)),
        active("idle", "idle", now=7),
        active(0, 0, now=8),
    ]
    assert actions(looks) == [
        "wait", "wait", "delete", "wait", "create", "wait", "setup", "start", "end",
    ]  # fmt: skip


@pytest.mark.parametrize("codes", [(42, 42), (141, 137), (142, 134), (0, 143)])
def test_ends_that_the_same_command_mends_are_started_again(codes):
    step = play([active("running", "running"), active(*codes, now=60)])[-1]
    assert step.action == "start" and step.wait_seconds > 0


@pytest.mark.parametrize(
    ("codes", "code"), [((2, 141), 2), ((141, 3), 3), ((5, 5), 5), ((8, 0), 8)]
)
def test_other_ends_are_final_and_give_the_code(codes, code):
    step = play([active("running", "running"), active(*codes, now=60)])[-1]
    assert (step.action, step.code) == ("end", code)
    assert f"w{codes.index(code)} {code}" in step.say


def test_restarts_pause_longer_and_longer_and_then_stop():
    steps = play([active("running"), *[active(141, now=n) for n in range(1, 9)]])
    pauses = [step.wait_seconds for step in steps if step.action == "start"]
    assert len(pauses) == LIMITS.restarts and pauses == sorted(set(pauses))
    assert (steps[-1].action, steps[-1].code) == ("end", 141)


def test_a_run_that_lasted_clears_the_count():
    looks: list[Seen] = [active("running")]
    for n in range(1, 10):
        begin = n * 10_000.0
        looks += [active(42, now=begin), active("running", now=begin + 1000)]
        looks += [active("running", now=begin + 1000 + LIMITS.healthy_seconds)]
    assert "end" not in actions(looks)


def test_what_ended_before_the_babysitter_came_is_started():
    """The user mended something and started the babysitter again."""
    assert actions([active(2, 2)]) == ["start"]


def test_other_code_than_what_is_set_up_is_sent():
    old = Seen(0, "ACTIVE", workers(2, 2, revision="old"))
    assert actions([old, active("idle", "idle", now=1)]) == ["setup", "start"]


def test_a_running_job_is_left_alone_whatever_its_code():
    assert actions([Seen(0, "ACTIVE", workers("running", revision="old"))]) == ["wait"]


def test_a_start_that_reached_some_workers_only_is_given_again():
    assert actions([active("idle", "idle"), active("running", "idle", now=1)]) == ["start", "start"]


def test_processes_that_run_on_without_the_others_are_stopped():
    looks = [active("running", "running"), *[active(141, "running", now=n) for n in range(1, 5)]]
    assert actions(looks) == ["wait", "wait", "wait", "stop", "wait"]


def test_setting_up_is_tried_a_few_times():
    looks = [Seen(n, "ACTIVE", (Worker("?", "none", "idle"),)) for n in range(5)]
    assert actions(looks) == ["setup", "setup", "end"]
    assert play(looks)[-1].code == 2


def test_a_request_that_always_fails_is_given_up():
    looks = [Seen(n, state) for n in range(8) for state in ("FAILED", None)]
    assert actions(looks) == ["delete", "create", "delete", "create", "end"]
    assert play(looks)[-1].code == 8


def test_a_request_that_failed_once_and_was_served_is_forgiven():
    looks = [Seen(0, "FAILED"), active("running"), Seen(2, "FAILED"), active("running"),
             Seen(4, "FAILED"), active("running")]  # fmt: skip
    assert "end" not in actions(looks)


def test_slices_that_do_not_answer_are_given_back():
    looks = [active("running", answered=False, now=n) for n in range(3)]
    assert actions(looks) == ["wait", "wait", "delete"]
    some = [active("running", answered=False), active("running"), active("running", answered=False)]
    assert actions(some) == ["wait", "wait", "wait"]


def test_an_unknown_state_is_waited_for():
    assert actions([Seen(0, "SOMETHING_NEW")]) == ["wait"]


def test_what_the_commands_print_is_read():
    assert read_resource('{"state": {"state": "ACTIVE", "activeData": {}}}') == "ACTIVE"
    assert read_resource("garbage") == "STATE_UNSPECIFIED"
    text = (
        "SSH: Attempting to connect to worker 0...\n"
        "arcticjax-status t1v-n-a-w-0 abc running\narcticjax-status t1v-n-a-w-1 none idle\n"
        "arcticjax-status w2 abc ended 141\nsome arcticjax-status x y idle\n"
    )
    assert read_workers(text) == (
        Worker("t1v-n-a-w-0", "abc", "running"),
        Worker("t1v-n-a-w-1", "none", "idle"),
        Worker("w2", "abc", "ended", 141),
    )
