mod numbers;
mod plan_faults;
mod plans;
mod plans_account;
mod plans_random;
mod plans_snapshots;
mod plans_time;
mod ranks;
