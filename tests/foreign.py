"""GANs as other people write them: they know nothing of this package."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.func import functional_call

SHAPE = (1, 4, 4)


class TutorialGenerator(nn.Module):
    def __init__(self, latent_dim, shape=SHAPE):
        super().__init__()
        self.shape = shape

        def block(in_features, out_features, normalize=True):
            layers = [nn.Linear(in_features, out_features)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_features, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, 16, normalize=False),
            *block(16, 24),
            nn.Linear(24, int(torch.tensor(shape).prod())),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.model(z).view(len(z), *self.shape)


class TutorialDiscriminator(nn.Module):
    def __init__(self, shape=SHAPE):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(int(torch.tensor(shape).prod()), 24),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(24, 16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(16, 1),
            nn.Sigmoid(),
        )

    def forward(self, img):
        return self.model(img.view(img.size(0), -1))


class TutorialGAN(LightningModule):
    """Lightning's tutorial: manual optimization, toggled optimizers, BCE, the generator first."""

    def __init__(self, latent_dim=5, lr=2e-3, shape=SHAPE):
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = latent_dim
        self.lr = lr
        self.generator = TutorialGenerator(latent_dim, shape)
        self.discriminator = TutorialDiscriminator(shape)

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy(y_hat, y)

    def draw(self, num):
        return torch.randn(num, self.latent_dim, device=self.device)

    def training_step(self, batch):
        imgs = batch[0]
        optimizer_g, optimizer_d = self.optimizers()
        z = self.draw(imgs.shape[0]).type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2 + self.penalty(z)
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        self.before_critic_step(optimizer_d)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def penalty(self, z):
        return 0.0

    def before_critic_step(self, optimizer):
        pass

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.lr, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.lr, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


class ClippedTutorialGAN(TutorialGAN):
    """The same with Lightning's clipping of the critic's gradient."""

    def before_critic_step(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def mlp(num_in, num_out, width=16, act=nn.SiLU):
    return nn.Sequential(nn.Linear(num_in, width), act(), nn.Linear(width, num_out))


class WGAN(LightningModule):
    """Weight clipping, five critic steps in a batch's turn, optimizers never toggled."""

    def __init__(self, latent_dim=5, critic_steps=5, lr=5e-3, clip=0.3):
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim, self.critic_steps, self.lr, self.clip = latent_dim, critic_steps, lr, clip
        self.nets = nn.ModuleDict(
            {
                "G": nn.Sequential(mlp(latent_dim, 16), nn.Tanh(), nn.Unflatten(1, SHAPE)),
                "D": nn.Sequential(nn.Flatten(), mlp(16, 1)),
            }
        )

    def draw(self, num):
        return torch.randn(num, self.latent_dim, device=self.device)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_g, opt_d = self.optimizers()
        z = self.draw(len(x))
        loss = self.nets["D"](self.nets["G"](z).detach()).mean() - self.nets["D"](x).mean()
        opt_d.zero_grad()
        self.manual_backward(loss + self.penalty(z))
        opt_d.step()
        for p in self.nets["D"].parameters():
            p.data.clamp_(-self.clip, self.clip)
        if (batch_idx + 1) % self.critic_steps == 0:
            loss = -self.nets["D"](self.nets["G"](self.draw(len(x)))).mean()
            opt_g.zero_grad()
            self.manual_backward(loss)
            opt_g.step()

    def penalty(self, z):
        return 0.0

    def configure_optimizers(self):
        return (
            torch.optim.RMSprop(self.nets["G"].parameters(), lr=self.lr),
            torch.optim.RMSprop(self.nets["D"].parameters(), lr=self.lr),
        )


class AutomaticCritic(LightningModule):
    """Automatic optimization of the critic; the generator's optimizer is the user's own affair."""

    def __init__(self, latent_dim=5, lr=2e-2, critic_steps=5):
        super().__init__()
        self.latent_dim, self.lr, self.critic_steps = latent_dim, lr, critic_steps
        self.netG = nn.Sequential(mlp(latent_dim, 16), nn.Unflatten(1, SHAPE))
        self.netD = nn.Sequential(nn.Flatten(), mlp(16, 1))
        self.own = torch.optim.SGD(self.netG.parameters(), lr=lr)

    def draw(self, num):
        return torch.randn(num, self.latent_dim, device=self.device)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        z = self.draw(len(x))
        with torch.no_grad():
            fake = self.netG(z)
        return self.netD(fake).mean() - self.netD(x).mean() + self.penalty(z)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.critic_steps == 0:
            loss = -self.netD(self.netG(self.draw(len(batch[0])))).mean()
            gradients = torch.autograd.grad(loss, list(self.netG.parameters()))
            for p, g in zip(self.netG.parameters(), gradients, strict=True):
                p.grad = g
            self.own.step()

    def penalty(self, z):
        return 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.netD.parameters(), lr=self.lr)


class HingeGAN(LightningModule):
    """A plain module around any two networks: hinge loss, the critic first."""

    def __init__(self, generator, discriminator, latent_dim, lr=1e-3):
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim, self.lr = latent_dim, lr
        self.netG, self.netD = generator, discriminator

    def draw(self, num):
        return torch.randn(num, self.latent_dim, device=self.device)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_g, opt_d = self.optimizers()
        z = self.draw(len(x))
        fake = self.netG(z)
        loss = F.relu(1 - self.netD(x)).mean() + F.relu(1 + self.netD(fake.detach())).mean()
        opt_d.zero_grad()
        self.manual_backward(loss + self.penalty(z))
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(-self.netD(fake).mean())
        opt_g.step()

    def penalty(self, z):
        return 0.0

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.netG.parameters(), lr=self.lr, betas=(0.0, 0.9)),
            torch.optim.Adam(self.netD.parameters(), lr=self.lr, betas=(0.0, 0.9)),
        )


def by_hand(module, generator, critic, alpha, values=lambda out: out):
    """Write the penalty into a module's loss, by double backward through copies of the weights."""

    def penalty(z):
        networks = [module.get_submodule(path) for path in (generator, critic)]
        buffers = [(b, b.clone()) for net in networks for b in net.buffers()]
        leaves = {n: p.detach().requires_grad_() for n, p in networks[0].named_parameters()}
        state = torch.get_rng_state()
        with torch.enable_grad():
            f = values(networks[1](functional_call(networks[0], leaves, (z,)))).mean()
            g = torch.autograd.grad(f, list(leaves.values()), create_graph=True)
        torch.set_rng_state(state)
        for buffer, before in buffers:
            buffer.data.copy_(before)
        return alpha / 2 * sum(part.square().sum() for part in g)

    module.penalty = penalty
    return module
