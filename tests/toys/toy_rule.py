"""A rule in one file: the generator follows the mean of the data, the critic counts."""

from dataclasses import dataclass, field

from lightning_mmd import UpdateRule


@dataclass
class MeanMatching(UpdateRule):
    """Descends ||E x - E G(z)||^2 / 2; the critic's scores sink towards zero."""

    weight: float = 1.0
    seen: int = field(default=0, init=False, repr=False, compare=False)

    def update(self, game):
        z = game.latents()
        fake = game.generator.network(*z)
        mean = game.processes.mean
        gap = mean(game.images.mean(0)) - mean(fake.detach().mean(0))
        scores = game.critic.network(*game.target(z))
        game.critic.step(mean(game.critic.gradient(scores.square().mean())))
        loss = -self.weight * (fake.mean(0) * gap).sum()
        self.seen += 1
        metrics = {"critic/gap": gap.norm(), "seen": self.seen}
        if game.moves_generator:
            metrics["generator/gradient_norm"] = game.generator.step(
                mean(game.generator.gradient(loss))
            )
        return metrics

    def gap(self, critic, real, fake):
        return (real[0].mean(0) - fake[0].mean(0)).norm()

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
