r"""A Comprehensive Overhaul of Feature Distillation (Heo et al.; ICCV 2019; arXiv:1904.01866).

Layers are compared in front of their ReLU. Where the teacher is above 0 the student should be the same; elsewhere the
ReLU lets nothing through, so the student need only be low enough, and no lower than a margin $m < 0$:

$$\sigma_m(t) = \max(t, m), \qquad
  d(s, t) = \sum_i \begin{cases} 0 & s_i \le t_i \le 0 \\ (s_i - t_i)^2 & \text{otherwise,} \end{cases} \qquad
  L = \alpha \sum_{l=1}^{n} 2^{l-n} \operatorname*{mean}_b d\big(\mathrm{BN}(W_l s_l), \sigma_m(t_l)\big)$$

The margin of a channel is what the teacher shows on average where it is below 0, taken from the BatchNorm in front of
the ReLU, whose channels have mean $\beta$ and deviation $\lvert\gamma\rvert$:

$$m = \operatorname{E}\big[x \mid x < 0,\ x \sim \mathcal N(\beta, \gamma^2)\big]
    = \beta - \lvert\gamma\rvert \frac{\varphi(\beta/\gamma)}{\Phi(-\beta/\lvert\gamma\rvert)}$$

A tap shows what a ReLU is about to cut, `stage1_pre` in the tables of our models. Its BatchNorm is the tapped module itself,
or the only one in it. A sum (the last block of a residual stage) has none of its own; then the teacher's table
says which it is (`stage1_pre_norm`), or the knob `norms` does. The official code takes the residual branch's last.

Weights: the official code sums over channels and positions, and so do we; where channels double as the grid halves, $2^{l-n}$ makes all
layers equal per element. Its $\alpha$ is 1e-3 on CIFAR-100, as is mdistiller's, and 1e-4 on ImageNet. It is the knob `scale`, so a
term's weight of 1 is theirs.

Departures from the paper:
- The teacher answers with its running statistics, as teachers do here and in mdistiller. There and in the official code it uses the
  batch's, which they found a little better (Table 8) and which moves the running ones.
- From the official code: $m = -3 \lvert\gamma\rvert$ in a channel of which less than 0.001 is below 0.

Departures from the official code (clovaai/overhaul-distillation):
- Where grids differ the teacher's map is averaged over the student's cells, as in mdistiller; there they never do.
- A channel whose $\gamma$ is 0 has the margin $\min(\beta, 0)$; there it is a division by 0.
"""
