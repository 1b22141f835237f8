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
        g_loss = self.generator_loss(self(z), valid)
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

    def generator_loss(self, fake, valid):
        return self.adversarial_loss(self.discriminator(fake), valid)

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


# GANs in their authors' calling styles. `penalty` and `adversarial` are where a test writes by hand
# what callbacks do; they are nothing of their own.


class Styled(LightningModule):
    """What the GANs below share."""

    latent_dim = 5

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def penalty(self, name, *inputs):
        return 0.0

    def adversarial(self, name, critic, fake, loss, moves=True):
        return loss(critic(fake))

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def fixed_latents(self, num, seed=0):
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(num, self.latent_dim, generator=rng), torch.arange(num) % 4


class ConditionalGAN(Styled):
    """Labels embedded and put beside latents and images; least squares, the generator first."""

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.label_emb = nn.Embedding(4, 4)
            self.model = nn.Sequential(mlp(4 + 5, 16), nn.Tanh())

        def forward(self, noise, labels):
            gen_input = torch.cat((self.label_emb(labels), noise), -1)
            return self.model(gen_input).view(-1, *SHAPE)

    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.label_embedding = nn.Embedding(4, 4)
            self.model = mlp(4 + 16, 1)

        def forward(self, img, labels):
            d_in = torch.cat((img.view(img.size(0), -1), self.label_embedding(labels)), -1)
            return self.model(d_in)

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = self.Generator(), self.Discriminator()

    def training_step(self, batch, batch_idx):
        optimizer_G, optimizer_D = self.optimizers()
        real_imgs, labels = batch
        valid, fake = torch.ones(len(labels), 1), torch.zeros(len(labels), 1)
        z = torch.randn(len(labels), self.latent_dim)
        gen_labels = torch.randint(0, 4, (len(labels),))
        gen_imgs = self.generator(z, gen_labels)
        g_loss = self.adversarial(
            "discriminator",
            lambda x: self.discriminator(x, gen_labels),
            gen_imgs,
            lambda validity: F.mse_loss(validity, valid),
        )
        self.step(optimizer_G, g_loss)
        d_real_loss = F.mse_loss(self.discriminator(real_imgs, labels), valid)
        d_fake_loss = F.mse_loss(self.discriminator(gen_imgs.detach(), gen_labels), fake)
        d_loss = (d_real_loss + d_fake_loss) / 2 + self.penalty("discriminator", z, gen_labels)
        self.step(optimizer_D, d_loss)

    @torch.no_grad()
    def sample(self, num, latents):
        return self.generator(*latents)

    def configure_optimizers(self):
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999)) for net in nets]


class CycleGAN(Styled):
    """Two generators in one optimizer, each called three times a step; two critics of patches."""

    def __init__(self):
        super().__init__()
        self.netG_A, self.netG_B = (nn.Sequential(*self.convolutions(1, 1)) for _ in "AB")
        self.netD_A, self.netD_B = (nn.Sequential(*self.convolutions(1, 1, 2)) for _ in "AB")

    def convolutions(self, num_in, num_out, stride=1):
        first = nn.Conv2d(num_in, 4, 3, stride, 1, bias=False)
        return first, nn.InstanceNorm2d(4), nn.SiLU(), nn.Conv2d(4, num_out, 3, 1, 1)

    def backward_D(self, netD, real, fake, name, source):
        pred_real, pred_fake = netD(real), netD(fake.detach())
        loss_D = F.mse_loss(pred_real, torch.ones_like(pred_real)) + F.mse_loss(
            pred_fake, torch.zeros_like(pred_fake)
        )
        self.manual_backward(loss_D * 0.5 + self.penalty(name, source))

    def training_step(self, batch, batch_idx):
        optimizer_G, optimizer_D_A, optimizer_D_B = self.optimizers()
        real_A, real_B = batch[0], batch[0].flip(-1).neg()
        fake_B, fake_A = self.netG_A(real_A), self.netG_B(real_B)
        rec_A, rec_B = self.netG_B(fake_B), self.netG_A(fake_A)
        loss_idt = F.l1_loss(self.netG_A(real_B), real_B) + F.l1_loss(self.netG_B(real_A), real_A)
        loss_cycle = F.l1_loss(rec_A, real_A) + F.l1_loss(rec_B, real_B)
        for net in (self.netD_A, self.netD_B):
            net.requires_grad_(False)
        loss_G = 5 * loss_idt + 10 * loss_cycle
        for name, fake in (("netD_A", fake_B), ("netD_B", fake_A)):
            critic = getattr(self, name)
            loss_G += self.adversarial(name, critic, fake, lambda p: (p - 1).square().mean())
        self.step(optimizer_G, loss_G)
        for net, optimizer, real, fake, name, source in (
            (self.netD_A, optimizer_D_A, real_B, fake_B, "netD_A", real_A),
            (self.netD_B, optimizer_D_B, real_A, fake_A, "netD_B", real_B),
        ):
            net.requires_grad_(True)
            optimizer.zero_grad()
            self.backward_D(net, real, fake, name, source)
            optimizer.step()

    def fixed_latents(self, num, seed=0):
        return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def sample(self, num, latents):
        return self.netG_A(latents)

    def configure_optimizers(self):
        generators = [*self.netG_A.parameters(), *self.netG_B.parameters()]
        critics = (self.netD_A.parameters(), self.netD_B.parameters())
        return [torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.999)) for p in (generators, *critics)]


class StyleGAN2(Styled):
    """A list of latents in, a pair out; noise in the layers; networks frozen by turns, lazy R1."""

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.style = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU())
            self.input = nn.Parameter(torch.randn(1, 16))
            self.convs = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.modulations = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
            self.strength = nn.Parameter(torch.full((2,), 0.1))

        def forward(self, styles, return_latents=False, inject_index=None):
            styles = [self.style(s) for s in styles]
            latent = torch.stack([styles[0], styles[-1]])
            out = self.input.repeat(len(styles[0]), 1)
            for i, (conv, modulation) in enumerate(zip(self.convs, self.modulations, strict=True)):
                out = F.silu(conv(out * modulation(latent[i])))
                out = out + self.strength[i] * torch.randn(len(out), 1).expand_as(out)
            return out.view(-1, *SHAPE), (latent if return_latents else None)

    def __init__(self):
        super().__init__()
        self.generator = self.Generator()
        self.discriminator = nn.Sequential(nn.Flatten(), mlp(16, 1))

    def training_step(self, batch, batch_idx):
        g_optim, d_optim = self.optimizers()
        real_img = batch[0]
        self.generator.requires_grad_(False)
        self.discriminator.requires_grad_(True)
        noise = list(torch.randn(2, len(real_img), self.latent_dim).unbind(0))
        fake_img, _ = self.generator(noise, inject_index=1)
        fake_pred, real_pred = self.discriminator(fake_img), self.discriminator(real_img)
        d_loss = F.softplus(-real_pred).mean() + F.softplus(fake_pred).mean()
        self.step(d_optim, d_loss + self.penalty("discriminator", noise))
        if batch_idx % 4 == 0:
            real_img.requires_grad_()
            (grad,) = torch.autograd.grad(
                self.discriminator(real_img).sum(), real_img, create_graph=True
            )
            self.step(d_optim, 0.1 * grad.flatten(1).square().sum(1).mean())
        self.generator.requires_grad_(True)
        self.discriminator.requires_grad_(False)
        noise = [torch.randn(len(real_img), self.latent_dim)]
        fake_img, _ = self.generator(noise)
        loss = self.adversarial(
            "discriminator", self.discriminator, fake_img, lambda pred: F.softplus(-pred).mean()
        )
        self.step(g_optim, loss)

    @torch.no_grad()
    def sample(self, num, latents):
        return self.generator([latents[0]])

    def configure_optimizers(self):
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.0, 0.99)) for net in nets]


class InfoGAN(Styled):
    """A critic that returns three things; a third optimizer that holds both networks."""

    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.SiLU())
            self.adv_layer, self.aux_layer = nn.Linear(16, 1), nn.Linear(16, 4)
            self.latent_layer = nn.Linear(16, 2)

        def forward(self, img):
            out = self.trunk(img)
            return self.adv_layer(out), self.aux_layer(out).softmax(1), self.latent_layer(out)

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1 = mlp(5 + 4 + 2, 16)

        def forward(self, noise, labels, code):
            return self.l1(torch.cat((noise, labels, code), -1)).view(-1, *SHAPE)

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = self.Generator(), self.Discriminator()

    def draw(self, num):
        labels = F.one_hot(torch.randint(0, 4, (num,)), 4).to(torch.get_default_dtype())
        return torch.randn(num, self.latent_dim), labels, torch.rand(num, 2) * 2 - 1

    def training_step(self, batch, batch_idx):
        optimizer_G, optimizer_D, optimizer_info = self.optimizers()
        real_imgs = batch[0]
        inputs = self.draw(len(real_imgs))
        gen_imgs = self.generator(*inputs)
        g_loss = self.adversarial(
            "discriminator", self.discriminator, gen_imgs, lambda out: (out[0] - 1).square().mean()
        )
        self.step(optimizer_G, g_loss)
        real_pred, _, _ = self.discriminator(real_imgs)
        fake_pred, _, _ = self.discriminator(gen_imgs.detach())
        d_loss = ((real_pred - 1).square().mean() + fake_pred.square().mean()) / 2
        self.step(optimizer_D, d_loss + self.penalty("discriminator", *inputs))
        inputs = self.draw(len(real_imgs))
        info_loss = self.adversarial(
            "discriminator",
            self.discriminator,
            self.generator(*inputs),
            lambda out: F.mse_loss(out[1], inputs[1]) + 0.1 * F.mse_loss(out[2], inputs[2]),
            moves=False,
        )
        self.step(optimizer_info, info_loss)

    def fixed_latents(self, num, seed=0):
        z, labels = super().fixed_latents(num, seed)
        return z, F.one_hot(labels, 4).to(z), z[:, :2].tanh()

    @torch.no_grad()
    def sample(self, num, latents):
        return self.generator(*latents)

    def configure_optimizers(self):
        own = [self.generator.parameters(), self.discriminator.parameters()]
        both = [*self.generator.parameters(), *self.discriminator.parameters()]
        return [torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)) for p in (*own, both)]
