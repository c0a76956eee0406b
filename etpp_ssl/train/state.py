"""Progress and environment of a run; defined in `etpp_ssl.run_state`."""

from etpp_ssl.run_state import LIBRARIES as LIBRARIES
from etpp_ssl.run_state import TrainState as TrainState
from etpp_ssl.run_state import environment as environment
from etpp_ssl.run_state import environment_changes as environment_changes
