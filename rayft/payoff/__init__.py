"""RGDM's pay-off distribution (R Eq. 9): where its candidates come from, what they weigh, and the bank that keeps them.

    q_pd(x_prev | x_t, x_0) ~ exp(r(x_prev)/tau) 1[|x_prev - x_tilde| <= d],    x_prev = x_tilde + eps_star

Nothing here depends on the policy being trained: the distribution is stationary, so it can be sampled ahead and kept.
"""
