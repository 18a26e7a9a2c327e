-- Compose runs this when its database starts for the first time: a second database for users.
CREATE DATABASE mlflow_auth;
