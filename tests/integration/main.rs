mod numbers;
mod plans;
mod plans_random;
mod plans_time;
mod ranks;
