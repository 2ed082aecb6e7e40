"""Goals: what each objective holds and computes beside plain training, whether isotrain can train it yet or not."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import ConfigError
from parallel.capabilities import BUILT, Capabilities


@dataclass(frozen=True)
class Goal:
    """An objective as a plan sees it.

    ``row_sequences``: sequences of a batch's row, which go through the model together; 2: a chosen and a rejected one.
    ``has_reference``: what a model of before the run says of each row is needed too: a forward pass without gradients.
    """

    name: str
    row_sequences: int = 1
    has_reference: bool = False

    def words(self, frozen: bool) -> str:
        """What a plan says of it; ``frozen``: the base does not learn.

        Example:
            >>> GOALS["orpo"].words(frozen=True)
            'orpo: a row is a pair of sequences, without a reference'
        """
        if self.row_sequences == 1:
            return self.name
        model = "the base without its adapter, no second copy" if frozen else "a second, frozen copy of the model"
        reference = f"the reference is {model}" if self.has_reference else "without a reference"
        return f"{self.name}: a row is a pair of sequences, {reference}"


GOALS = {
    goal.name: goal
    for goal in (Goal("sft"), Goal("dpo", 2, has_reference=True), Goal("orpo", row_sequences=2), Goal("simpo", 2))
}
"""Of a row's two sequences, DPO of a reference too: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; Hong et al.
2024 (arXiv:2403.07691), equation 6; Meng et al. 2024 (arXiv:2405.14734), equation 6."""


def is_built(objective: str, built: Capabilities = BUILT) -> bool:
    """Whether isotrain can train it."""
    return objective in built.objectives


def check_trainable(objective: str) -> None:
    """Refuse to train what can only be planned.

    Raises:
        ConfigError: the objective is not built.
    """
    if not is_built(objective):
        known = ", ".join(BUILT.objectives)
        raise ConfigError(
            f"objective.name={objective} can be planned but not trained yet; what trains is {known}",
            f"objective={BUILT.objectives[0]}",
        )
