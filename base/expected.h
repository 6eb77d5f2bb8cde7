#pragma once

#include <string>
#include <utility>
#include <variant>

namespace postern {

/// Carries the error of a failed Expected. Same spelling as std::unexpected.
template <class E>
struct Unexpected {
  E value;
};
template <class E>
Unexpected(E) -> Unexpected<E>;

/// What failed, for three audiences: `code` for the program (an errno value, or 0), `doing` for the log (what we were
/// doing, with the detail), `user_message` for the person at the other end (empty: nothing to say to them).
struct Error {
  int code = 0;
  std::string doing;
  std::string user_message = {};
};

/// Error of a failed system call: "doing: strerror(code)". `code` defaults to errno at the call.
Error system_error(std::string doing);
Error system_error(std::string doing, int code);

/// A value, or the reason there is none. A small subset of C++23 std::expected, so that it becomes an alias when the
/// oldest supported compiler has it. Reading the wrong side is a programming error (std::bad_variant_access).
template <class T, class E = Error>
class [[nodiscard]] Expected {
 public:
  Expected(T value) : data_{std::in_place_index<0>, std::move(value)} {}
  Expected(Unexpected<E> error) : data_{std::in_place_index<1>, std::move(error.value)} {}

  explicit operator bool() const noexcept { return data_.index() == 0; }
  bool has_value() const noexcept { return data_.index() == 0; }
  T& operator*() & { return std::get<0>(data_); }
  const T& operator*() const& { return std::get<0>(data_); }
  T&& operator*() && { return std::get<0>(std::move(data_)); }
  T* operator->() { return &std::get<0>(data_); }
  const T* operator->() const { return &std::get<0>(data_); }
  E& error() { return std::get<1>(data_); }
  const E& error() const { return std::get<1>(data_); }

 private:
  std::variant<T, E> data_;
};

/// Success without a value.
struct Done {};

}  // namespace postern
