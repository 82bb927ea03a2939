//! What a job sees, and what it is kept from.
