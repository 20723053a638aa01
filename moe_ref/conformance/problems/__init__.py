"""Problems that an executor is given: described, drawn, built."""
