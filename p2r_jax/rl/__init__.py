"""PRA-GRPO: rewards, advantages, losses, and the schedule that trains one role at a time."""
