"""The commands that show a run to others on the Hub: card, push."""

from pathlib import Path

from tyro.conf import Positional


def card(run: Positional[Path], name: Positional[str], license: str | None = None) -> None:
    """Write RUN/README.md, the model card: to read and to edit before igpt push takes it.

    Args:
        run: run directory.
        name: USER/NAME that the model is to have on the Hub.
        license: its identifier on the Hub, such as apache-2.0; by default nothing is said of one.
    """
    from igpt.report.card import write_card

    print(write_card(run, name, license=license))


def push(run: Positional[Path], name: Positional[str], private: bool = False) -> None:
    """Upload a run's model, its card and its pictures to the Hub.

    Args:
        run: run directory; its README.md goes up as it is, or is written where there is none (igpt
            card).
        name: USER/NAME; the repository is made where there is none.
        private: for your eyes only, of a new repository.
    """
    from igpt.report.card import CARD, doubts, push_to_hub

    told = doubts(run, name) if (run / CARD).exists() else []
    address = push_to_hub(run, name, private=private)
    for doubt in told:
        print(f"{run / CARD} {doubt}; igpt card {run} {name} writes it anew, to be pushed again")
    print(address)
