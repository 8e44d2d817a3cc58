"""The theorem over random stories: a fixed run over every setting, and one where Hypothesis draws the events and shortens what fails."""
import json
import random
import time

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kvm_mmu_lit.mmu.contexts import KvmBug
from kvm_mmu_lit.review.stories import ACTS, Ended, interrupted, shortened, tell
from kvm_mmu_lit.review.theorem import Story, all_settings

SETTINGS = all_settings()


def told(ended):
    "A failure as a short story."
    lines = [json.dumps(event) for event in shortened(ended)]
    return f"{ended.setting}, seed {ended.seed}, step {ended.steps}: {ended.broken}\n" + '\n'.join(lines)


@pytest.mark.parametrize('part', range(8))
def test_every_setting(part):
    for n, setting in enumerate(SETTINGS):
        if n % 8 != part: continue
        ended = tell(setting, n, 60)
        assert not ended.broken, told(ended)
        assert ended.steps == 60


def act(name):
    "A rule: one event of this kind, maybe interrupted."
    def do(self, rng, cut):
        event = ACTS[name](self.story, rng, vcpu := rng.randrange(self.story.setting.vcpus), self.story.machine.vcpus[vcpu])
        if cut and name in ('access', 'edit'): event = interrupted(self.story, rng, event)
        try: self.story.do(event)
        except KvmBug as bug:
            ended = Ended(self.story.setting, self.seed, len(self.story.events), None, f"{type(bug).__name__}: {bug}", tuple(self.story.events))
            raise AssertionError(told(ended)) from bug
        type(self).steps += 1
    do.__name__ = name
    return rule(rng=st.randoms(use_true_random=False), cut=st.booleans())(do)


class Stories(RuleBasedStateMachine):
    "Hypothesis decides what happens."
    steps = 0

    @initialize(setting=st.sampled_from(SETTINGS), seed=st.integers(0, 99))
    def begin(self, setting, seed): self.story, self.seed = Story(setting, seed), seed

    access, more, edit, flush, register, host = (act(name) for name in ('access', 'access', 'edit', 'flush', 'register', 'host'))
    nested = precondition(lambda self: self.story.setting.nested)(act('nested'))


def test_stories_of_hypothesis(record_property):
    started = time.monotonic()
    run_state_machine_as_test(Stories, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)))
    speed = Stories.steps / (time.monotonic() - started)
    record_property('steps/s', round(speed))
    assert Stories.steps > 500
