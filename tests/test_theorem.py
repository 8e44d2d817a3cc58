"""The theorem over random stories: a fixed run over every setting, and one where Hypothesis draws the events.

After every event of both all 53 invariants that an event can break are checked (`review.tables.places`). What fails
is cut
down by `review.stories.shortened`, which knows what an event is, and told in a few lines. Faster or slower, for
example:
`STORIES=500 python -m pytest tests/test_theorem.py -k hypothesis`.
"""
import json
import os
import time
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kvm_mmu_lit.mmu import rmap
from kvm_mmu_lit.mmu.contexts import KvmBug
from kvm_mmu_lit.review.stories import ACTS, Ended, interrupted, shortened, tell
from kvm_mmu_lit.review.theorem import Story
from kvm_mmu_lit.review.worlds import Setting, all_settings

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
        event = ACTS[name](self.story, rng, vcpu := rng.randrange(self.story.setting.vcpus),
                           self.story.machine.vcpus[vcpu])
        if cut and name in ('access', 'edit'): event = interrupted(self.story, rng, event)
        try: self.story.do(event)
        except KvmBug as bug:
            ended = Ended(self.story.setting, self.seed, len(self.story.events), None, f"{type(bug).__name__}: {bug}",
                          tuple(self.story.events))
            raise AssertionError(told(ended)) from bug
        type(self).steps += 1
    do.__name__ = name
    return rule(rng=st.randoms(use_true_random=False), cut=st.booleans())(do)


class Stories(RuleBasedStateMachine):
    "Hypothesis decides what happens."
    steps = 0

    @initialize(setting=st.sampled_from(SETTINGS), seed=st.integers(0, 99))
    def begin(self, setting, seed): self.story, self.seed = Story(setting, seed), seed

    access, more, edit, flush, register, host = (act(name)
                                                 for name in ('access', 'access', 'edit', 'flush', 'register', 'host'))
    nested = precondition(lambda self: self.story.setting.nested)(act('nested'))


def play(machine, examples):
    "Hypothesis only draws: its own shrinking would play thousands of stories to learn what `shortened` knows."
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None,
                                                         phases=phases, database=None,
                                                         derandomize=True, report_multiple_bugs=False,
                                                         suppress_health_check=list(HealthCheck)))


def test_stories_of_hypothesis(measured):
    started = time.process_time()
    play(Stories, int(os.environ.get('STORIES', 60)))
    assert Stories.steps > 500
    measured(f"stories of Hypothesis: {Stories.steps} steps, {Stories.steps / (time.process_time() - started):.0f} "
             f"each second of one core, every invariant after each")


def test_what_fails_is_told_short():
    """Without the flush after a frame has become a table, a machine of two vCPUs breaks; what is printed is a setting,
    an invariant and a few events."""
    class Broken(Stories):
        @initialize(seed=st.integers(0, 9))
        def begin(self, seed): self.story, self.seed = Story(Setting('shadow', '4-level', vcpus=2), seed), seed
    with patch.object(rmap, 'remote_flush', lambda vm: None), pytest.raises(AssertionError) as failed: play(Broken, 100)
    title, *events = str(failed.value).split('\n')
    assert title.startswith('shadow, 4-level guest, 2 vCPUs, seed ') and 'KvmBug: 5' in title
    assert 1 <= len(events) <= 8 and all(json.loads(event)['do'] for event in events)
