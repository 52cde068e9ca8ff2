# Completion of clip-base and regionclip in bash: eval "$(regionclip completion bash)"

_clip_base_complete() {
    local word line last="" value="" only_files=1 files=""
    local -a typed=()
    COMPREPLY=()
    # bash splits words at = and :, the programs do not.
    for word in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        if [[ ${#typed[@]} -gt 0 && ( $word == [=:]* || $last == *[=:] ) ]]; then
            typed[${#typed[@]} - 1]+=$word
        else
            typed+=("$word")
        fi
        last=$word
    done
    word=${typed[${#typed[@]} - 1]}
    [[ $word == *[=:]* ]] && value=${word%"${word##*[=:]}"}
    while IFS=$'\t' read -r line _; do
        if [[ $line == :files ]]; then
            files=1
            continue
        fi
        only_files=""
        line=${line#"$value"}
        [[ $line == *[=.] ]] || line+=" "
        COMPREPLY+=("$line")
    done < <("${COMP_WORDS[0]}" completion --words "${typed[@]}" 2>/dev/null)
    [[ -n $files ]] || return 0
    if [[ -n $only_files ]]; then # COMPREPLY is empty: readline's own completion of files steps in
        compopt +o nospace 2>/dev/null
        return 0
    fi
    while IFS= read -r line; do
        if [[ -d $line ]]; then line+=/; else line+=" "; fi
        COMPREPLY+=("$line")
    done < <(compgen -f -- "${word#"$value"}")
}

complete -o nospace -o bashdefault -o default -F _clip_base_complete clip-base regionclip
