"""What a replay makes of the configuration that it is given."""

from adaptd.app.replay.run import nothing_gone
from adaptd.config import Config, load


def test_no_domain_of_a_log_counts_as_gone_unless_that_is_asked_for() -> None:
    assert nothing_gone(Config()).gate.gone_loss == 0.0
    assert nothing_gone(load(None, ["gate.gone_loss=0.15"])).gate.gone_loss == 0.15
    given = load(None, ["gate.exchange=0.2"])
    assert nothing_gone(given).gate == given.gate.model_copy(update={"gone_loss": 0.0})
