"""A teacher that is always wrong teaches nothing; else truth would have leaked to its student."""

import pytest

from models.balancing import BalanceNoneConfig
from models.thresholds import FixedThresholdConfig
from tasks.evaluation import read_report
from tasks.selection import SelectionConfig

RULES = SelectionConfig(
    calibration="none",
    threshold=FixedThresholdConfig(confidence=0.5),
    balance=BalanceNoneConfig(),
)


@pytest.fixture
def accuracy_after(lab):
    """Return a function: test accuracy of a student whose teacher is off by so many classes."""

    def trained(shift):
        # Ten samples a shard in turn of the classes (tests/conftest.py); half of the shards hold
        # the truth as well, which nothing may read.
        rows, number = {}, {"u": 0, "v": 0}
        for shard in lab.unlabeled.shards:
            rows[shard.stem] = []
            for _ in range(shard.num_samples):
                prefix = "u" if number["u"] < 25 else "v"
                i, number[prefix] = number[prefix], number[prefix] + 1
                row = (f"{prefix}{i:03d}", (i % 3 + shift) % 3, 0.95, i % 3)
                rows[shard.stem].append(row)
        labels = lab.plant_labeling(lab.store, lab.unlabeled, rows, labeler=f"{shift}" * 64)
        chosen = lab.select(labels, None, RULES)
        config = lab.config(unlabeled_ratio=4, duration={"steps": 40})
        order = lab.order(config, role="student", round_index=1, selection=chosen.fingerprint)
        return accuracy(lab, order)

    return trained


def accuracy(lab, order):
    model = lab.train(order)
    return read_report(lab.store, lab.evaluate("test", model.fingerprint))["accuracy"]


def test_an_all_wrong_teacher_cannot_make_the_pipeline_look_good(lab, accuracy_after):
    # The same steps and images a step without pseudo-labels.
    supervised = accuracy(lab, lab.order(lab.config(batch_size=30, duration={"steps": 40})))
    wrong, right = accuracy_after(1), accuracy_after(0)
    assert wrong < supervised - 0.2
    # Pseudo-labels do steer the student: the same images with the true ones.
    assert right >= supervised - 0.1
